"""BitNet b1.58 from Hugging Face folders: transformers' own modules, and what must be refused.

tests/golden/bitnet-*.npz (make_bitnet.py) hold folders in the forms that are published, the
matrices as transformers' BitNet modules have them, and the logits it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from altered_json import alterations
from mixed_safetensors import parse, save_mixed
from reference import multiply
from tmac_py import LutLinear, Model, _core
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.checkpoint import Checkpoint
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor, ternary_tensor

GOLDEN = Path(__file__).parent / "golden"
LLAMA = ("llama-packed", "llama-offline", "llama-online")
BITNET = ("bitnet-offline", "bitnet-online")

ROUND_OFF = 4e-5
"""As in test_transformers_parity.py, and for the same reason."""

MEAN_ERROR = 2.0**-20
"""Of a mean of |w| in float32: torch adds up blocks of at most 128 numbers in 8 or more lanes and
then their sums in a tree, which is 24 roundings of 2^-24 at most for these sizes, with the division
and two inverses; the float64 mean has none but the last."""

UP = "model.layers.0.mlp.up_proj.weight"


class Golden:
    """One golden file: folder and arrays."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"bitnet-{name}.npz") as arrays:
            everything = dict(arrays)
        self.files = {n: everything[n].tobytes() for n in ("config.json", "model.safetensors")}
        self.matrices = {n[2:]: a for n, a in everything.items() if n.startswith("w.")}
        self.ids: NDArray[np.int32] = everything["ids"]
        self.logits: NDArray[np.float32] = everything["logits"]
        self.rounded: NDArray[np.float32] = everything["logits_rounded"]
        self.settled: NDArray[np.bool_] = everything["settled"]

    def folder(
        self,
        path: Path,
        *,
        config: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        tensors: Callable[[dict[str, NDArray[Any]]], None] | None = None,
    ) -> Path:
        """The folder as it is, or with changes to config.json, its quantization_config (None takes
        a key away) and the tensors."""
        path.mkdir()
        values = {**json.loads(self.files["config.json"]), **(config or {})}
        quantization = {**(values["quantization_config"] or {}), **(settings or {})}
        values["quantization_config"] = {k: v for k, v in quantization.items() if v is not None}
        (path / "config.json").write_text(json.dumps(values))
        if tensors is None:
            (path / "model.safetensors").write_bytes(self.files["model.safetensors"])
            return path
        stored = parse(self.files["model.safetensors"])
        tensors(stored)
        packed = {name: "U8" for name, w in stored.items() if w.dtype == np.uint8}
        save_mixed(path / "model.safetensors", stored, "BF16", packed)
        return path


def matrices_of(checkpoint: Checkpoint) -> dict[str, QuantTensor]:
    loaded = {tensor.name: tensor.load() for tensor in checkpoint.tensors}
    return {name: q for name, q in loaded.items() if isinstance(q, QuantTensor)}


def unpacked(file: LutFile, name: str) -> QuantTensor:
    """A ternary matrix of a .lut."""
    packed, spec = file.linear(name)
    assert spec.layout == "trits3-m32"
    assert spec.scale is not None
    codes, _, _ = _core.unpack(
        packed,
        m=spec.m,
        k=spec.k,
        bits=2,
        group_size=spec.k,
        offset_kind="none",
        encoding="ternary",
        scale=spec.scale,
    )
    return ternary_tensor(codes, spec.scale)


@pytest.mark.parametrize("name", LLAMA + BITNET)
def test_matrices_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    golden = Golden(name)
    checkpoint = open_checkpoint(golden.folder(tmp_path / "m"))
    assert checkpoint.config.activation_bits == 8
    found = matrices_of(checkpoint)
    assert set(found) == set(golden.matrices)
    assert len(found) == 2 * 7
    for matrix, want in golden.matrices.items():
        got = found[matrix]
        assert got.encoding == "ternary"
        assert got.scale is not None
        assert len(np.unique(got.codes)) == 3
        if name.endswith("online"):
            assert np.array_equal(np.sign(got.dequantize()), np.sign(want))
            assert np.isclose(got.scale, np.abs(want).max(), rtol=MEAN_ERROR, atol=0)
        else:
            assert np.array_equal(got.dequantize(), want)


@pytest.mark.parametrize("name", LLAMA + BITNET)
def test_lut_files_hold_the_same_matrices(tmp_path: Path, name: str) -> None:
    folder = Golden(name).folder(tmp_path / "m")
    for out in ("a.lut", "b.lut"):
        convert(folder, tmp_path / out)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    with LutFile.open(tmp_path / "a.lut") as file:
        assert file.config.activation_bits == 8
        assert file.source["quant_method"] == "bitnet"
        for matrix, want in matrices_of(open_checkpoint(folder)).items():
            got = unpacked(file, matrix)
            assert got.scale == want.scale
            assert np.array_equal(got.codes, want.codes)
        head = "model.embed_tokens" if file.config.tie_word_embeddings else "lm_head"
        assert file.linear(f"{head}.weight")[1].bits == 6


@pytest.mark.parametrize("name", LLAMA + BITNET)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Float32 round-off is all that is between them where no rounding is too close to call; the
    14 bits of lm_head's inputs and the fp16 keys and values are between the plain ones."""
    golden = Golden(name)
    convert(golden.folder(tmp_path / "m"), tmp_path / "m.lut", head_bits=8, group_size=32)
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        assert model.tables == "exact8"
        ours = model.logits(golden.ids)
        cache = model.new_cache()
        steps = [model.forward(golden.ids[i : i + 1], cache, "all") for i in range(len(ours))]
        assert np.array_equal(np.concatenate(steps), ours)
    assert golden.settled.mean() > 0.7
    assert np.abs(ours - golden.rounded)[golden.settled].max() < ROUND_OFF
    bound = np.abs(golden.rounded - golden.logits).max() + ROUND_OFF
    assert np.abs(ours - golden.logits)[golden.settled].max() <= bound
    # In the models with squares, fp16 keys and values turn some roundings to 8 bits.
    assert bound < (0.001 if name in LLAMA else 0.03 * golden.logits.std())
    with Model.load(tmp_path / "m.lut", threads=2, tables="int8") as model:
        assert model.tables == "int8"
        assert np.abs(model.logits(golden.ids) - golden.rounded).max() > 10 * ROUND_OFF


@pytest.mark.parametrize("n_tokens", [1, 3, 28])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_head_has_tables_of_its_own_however_tokens_come(
    tmp_path: Path, n_tokens: int, threads: int
) -> None:
    """lm_head is no BitLinear: its exact tables stand beside those of 8 bits, for tables and for
    integers, of one token and of many."""
    golden = Golden("llama-packed")
    convert(golden.folder(tmp_path / "m"), tmp_path / "m.lut", head_bits=8, group_size=32)
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        whole = model.logits(golden.ids)
    with Model.load(tmp_path / "m.lut", threads=threads, tables="exact8") as model:
        cache = model.new_cache()
        parts = [
            model.forward(golden.ids[i : i + n_tokens], cache, "all")
            for i in range(0, len(golden.ids), n_tokens)
        ]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("n_tokens", [1, 3, 20])
def test_exact_tables_are_integer_arithmetic(tmp_path: Path, name: str, n_tokens: int) -> None:
    """Activations x with 127 as the largest |x| of a token are their own 8 bits: the sum is an
    integer, to the last bit, and the product with the scale is rounded once."""
    folder, rng = Golden(name).folder(tmp_path / "m"), np.random.default_rng(n_tokens)
    convert(folder, tmp_path / "m.lut")
    with LutFile.open(tmp_path / "m.lut") as file:
        for matrix in matrices_of(open_checkpoint(folder)):
            q = unpacked(file, matrix)
            x = rng.integers(-127, 128, (n_tokens, q.k))
            x[:, rng.integers(q.k)] = rng.choice([-127, 127], n_tokens)
            sums = x @ (q.codes.astype(np.int64) - 1).T
            assert np.abs(sums).max() < 2**24
            unit = np.float32(2.0**-5)
            y = LutLinear(q, threads=2, tables="exact8").forward(x.astype(np.float32) * unit)
            want = (sums.astype(np.float32) * unit) * np.float32(q.scale)
            assert np.array_equal(y, want)
            defined = multiply(q, x[0].astype(np.float32) * unit, "exact8")
            assert np.array_equal(y[0], defined.astype(np.float32))


@pytest.mark.parametrize("name", LLAMA)
def test_exact_tables_round_as_bitnet_does(tmp_path: Path, name: str) -> None:
    """x_q = round(x * 127 / max|x|), y = (x_q . w_q) * g * max|x| / 127, for activations of any
    size that are not too close to the middle between two steps."""
    folder, rng = Golden(name).folder(tmp_path / "m"), np.random.default_rng(3)
    for matrix, q in matrices_of(open_checkpoint(folder)).items():
        steps = rng.integers(-126, 127, (8, q.k)).astype(np.float64)
        parts = rng.uniform(-0.49, 0.49, steps.shape)
        steps[:, 5], parts[:, 5] = 127, 0
        size = np.exp(rng.normal(0, 3, (8, 1)))
        y = LutLinear(q, threads=2, tables="exact8").forward((steps + parts) * size)
        sums = steps @ (q.codes.astype(np.float64) - 1).T
        assert q.scale is not None
        want = sums * size * q.scale
        assert np.array_equal(np.rint(y / (size * q.scale)), sums), matrix
        # One rounding each of x, max|x| / 127, its product with the sum, and that with g.
        assert (np.abs(y - want) <= 6 * 2.0**-24 * np.abs(want)).all()


# Forms of the same weights


def test_the_forms_of_other_publishers(tmp_path: Path) -> None:
    """1bitLLM: master weights without settings, "llama", norms of other names, silu."""

    def rename(tensors: dict[str, NDArray[Any]]) -> None:
        for name in list(tensors):
            other = name.replace("attn_sub_norm", "inner_attn_ln")
            other = other.replace("ffn_sub_norm", "ffn_layernorm")
            tensors[other] = tensors.pop(name)

    golden = Golden("bitnet-online")
    config = {
        "model_type": "llama",
        "architectures": ["BitnetForCausalLM"],
        "hidden_act": "silu",
        "weight_bits": 1,
        "input_bits": 8,
    }
    path = golden.folder(tmp_path / "m", config=config, tensors=rename)
    values = json.loads((path / "config.json").read_text())
    del values["quantization_config"]
    (path / "config.json").write_text(json.dumps(values))
    theirs = open_checkpoint(path)
    ours = open_checkpoint(golden.folder(tmp_path / "n"))
    assert [t.name for t in theirs.tensors] == [t.name for t in ours.tensors]
    assert theirs.config.sub_norms
    assert (theirs.config.activation_bits, theirs.config.hidden_act) == (8, "silu")
    for a, b in zip(theirs.tensors, ours.tensors, strict=True):
        one, other = a.load(), b.load()
        if isinstance(one, QuantTensor):
            assert isinstance(other, QuantTensor)
            assert np.array_equal(one.dequantize(), other.dequantize())
        else:
            assert np.array_equal(one[slice(None)], other[slice(None)])  # type: ignore[index]
    values["hidden_act"] = "relu2"  # all else is as in the golden model
    (path / "config.json").write_text(json.dumps(values))
    convert(path, tmp_path / "m.lut", head_bits=8, group_size=32)
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        off = np.abs(model.logits(golden.ids) - golden.rounded)
    assert off[golden.settled].max() < ROUND_OFF
    values["input_bits"] = 4
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match="input_bits 4 is not supported"):
        convert(path, tmp_path / "m.lut")


@pytest.mark.parametrize("name", BITNET)
def test_bitnet_config(tmp_path: Path, name: str) -> None:
    config = open_checkpoint(Golden(name).folder(tmp_path / "m")).config
    assert (config.hidden_act, config.sub_norms, config.rope_theta) == ("relu2", True, 500000.0)


@pytest.mark.parametrize("part", ["attn_sub_norm", "ffn_sub_norm", "hidden_act"])
def test_sub_norms_and_relu2_show(tmp_path: Path, part: str) -> None:
    """The comparison would notice a norm that is not read, and another activation."""

    def change(tensors: dict[str, NDArray[Any]]) -> None:
        for name in tensors:
            if name.endswith(f"{part}.weight"):
                tensors[name] = np.roll(tensors[name], 1)

    golden = Golden("bitnet-online")
    config = {"hidden_act": "silu"} if part == "hidden_act" else {}
    path = golden.folder(tmp_path / "m", config=config, tensors=change)
    convert(path, tmp_path / "m.lut", head_bits=8, group_size=32)
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        off = np.abs(model.logits(golden.ids) - golden.rounded).max()
    assert off > 1000 * ROUND_OFF


def test_offline_weights_that_are_not_packed(tmp_path: Path) -> None:
    golden = Golden("llama-offline")

    def unpack(tensors: dict[str, NDArray[Any]]) -> None:
        for name, packed in tensors.items():
            if packed.dtype == np.uint8:
                fields = [(packed >> 2 * i & 3).astype(np.float32) - 1 for i in range(4)]
                tensors[name] = np.concatenate(fields)

    path = golden.folder(tmp_path / "m", tensors=unpack)
    for name, q in matrices_of(open_checkpoint(path)).items():
        assert np.array_equal(q.dequantize(), golden.matrices[name])
    bad = golden.folder(tmp_path / "n", tensors=lambda t: (unpack(t), t[UP].__imul__(2))[0])
    with pytest.raises(ModelFileError, match=rf"{UP}: weights beside a weight_scale must be -1, 0"):
        convert(bad, tmp_path / "m.lut")


def test_modules_that_are_not_converted_stay_dense(tmp_path: Path) -> None:
    golden, dense = Golden("llama-packed"), "model.layers.1.mlp.down_proj.weight"

    def give_floats(tensors: dict[str, NDArray[Any]]) -> None:
        tensors[dense] = golden.matrices[dense]
        del tensors[dense + "_scale"]

    kept = {"modules_to_not_convert": ["lm_head", "layers.1.mlp.down_proj"]}
    path = golden.folder(tmp_path / "m", settings=kept, tensors=give_floats)
    found = matrices_of(open_checkpoint(path))
    assert set(golden.matrices) - set(found) == {dense}
    convert(path, tmp_path / "m.lut", bits=4)
    with LutFile.open(tmp_path / "m.lut") as file:
        assert file.linear(dense)[1].bits == 4


def test_rows_that_are_not_a_multiple_of_four() -> None:
    """Rows are ceil-divided; the fields of the last rows are not used."""
    from tmac_py.converters.bitnet import Packed

    class Array:
        def __init__(self, values: NDArray[Any]) -> None:
            self.values = values

        def load(self) -> NDArray[Any]:
            return self.values

    codes = np.random.default_rng(1).integers(0, 3, (10, 8), np.uint8)
    packed = np.zeros((3, 8), np.uint8)
    for row in range(10):
        packed[row % 3] |= codes[row] << np.uint8(2 * (row // 3))
    parts: Any = {"weight": Array(packed), "weight_scale": Array(np.ones(1, np.float32))}
    assert Packed(inverse=False).expected((10, 8), {})["weight"].shape == (3, 8)
    assert np.array_equal(Packed(inverse=False).load((10, 8), parts).codes, codes)


# Refusals


def change(name: str, value: float) -> Callable[[dict[str, NDArray[Any]]], None]:
    """Sets the first element of a tensor."""

    def apply(tensors: dict[str, NDArray[Any]]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[0] = value

    return apply


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("llama-packed", {"tensors": change(UP, 0xFF)}, rf"tensor {UP}: code 3"),
        ("llama-packed", {"tensors": change(UP + "_scale", np.nan)}, "weight_scale nan is not a p"),
        ("llama-offline", {"tensors": change(UP + "_scale", np.inf)}, "weight_scale inf is not a"),
        ("llama-offline", {"tensors": change(UP + "_scale", -1)}, "weight_scale -1 is not a posit"),
        ("llama-packed", {"tensors": change(UP + "_scale", 0)}, "weight_scale 0 is not a positive"),
        ("llama-packed", {"tensors": change(UP + "_scale", 1.25)}, "1.25 is small for an inverse"),
        ("llama-online", {"tensors": change(UP, np.nan)}, rf"tensor {UP}: weights are not finite"),
        (
            "llama-packed",
            {"tensors": lambda t: t.pop(UP + "_scale")},
            r"missing: model\.layers\.0\.mlp\.up_proj\.weight_scale \[1\]",
        ),
        (
            "llama-online",
            {"settings": {"linear_class": "bitlinear"}},
            r"q_proj\.weight \[64, 64\] instead of \[16, 64\]",
        ),
        (
            "llama-packed",
            {"settings": {"linear_class": "autobitlinear", "quantization_mode": "online"}},
            r"q_proj\.weight \[16, 64\] instead of \[64, 64\]",
        ),
        ("llama-packed", {"settings": {"use_rms_norm": True}}, "use_rms_norm"),
        ("llama-packed", {"settings": {"linear_class": "other"}}, "linear_class 'other' with"),
        (
            "llama-online",
            {"settings": {"quantization_mode": "both"}},
            "quantization_mode 'both' is not supported",
        ),
        (
            "llama-packed",
            {"settings": {"modules_to_not_convert": ["(a+)+$"]}},
            "modules_to_not_convert .* is not supported",
        ),
    ],
)
def test_refusals(tmp_path: Path, name: str, options: dict[str, Any], text: str) -> None:
    path = Golden(name).folder(tmp_path / "m", **options)
    with pytest.raises(TmacError, match=text) as caught:
        convert(path, tmp_path / "m.lut")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_stated_linear_class_is_trusted(tmp_path: Path) -> None:
    tensors = change(UP + "_scale", 1.25)
    stated = {"linear_class": "bitlinear"}
    path = Golden("llama-packed").folder(tmp_path / "m", settings=stated, tensors=tensors)
    assert matrices_of(open_checkpoint(path))[UP].scale == np.float32(0.8)


@pytest.mark.parametrize("name", ["llama-packed", "llama-online"])
def test_settings_of_any_other_form_are_read_or_refused(tmp_path: Path, name: str) -> None:
    path, refused = Golden(name).folder(tmp_path / "m"), []
    config = json.loads((path / "config.json").read_text())
    for settings in alterations(config["quantization_config"]):
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        try:
            open_checkpoint(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)
