"""Every type of GGUF matrices: against the gguf package's dequantisation, or the layout's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import (
    HALVES,
    TINY,
    encode,
    encode_i2_s,
    gguf_name,
    gguf_tensors,
    random_blocks,
    random_weights,
    set_type,
    to_gguf_order,
    write_gguf,
)
from tmac_py import Model, _core
from tmac_py.cli import main
from tmac_py.converters import convert
from tmac_py.converters import gguf as reader
from tmac_py.converters.gguf_types import (
    BLOCK_TYPES,
    CODEBOOK_TYPES,
    FLOAT_TYPES,
    CodebookMatrix,
    decode_i2_s,
    decode_tensor,
)
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor, quantize_rtn

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
"""Types that store fp16 scales: their weights must come back to the last bit."""

PRODUCTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types whose scales are products, rounded to fp16."""

EXTREME = (0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1e-5, -0.002, 0.75, 5.0)
"""Scales at the limits of fp16: zero, subnormal, the smallest normal one; and usual ones."""

KNOWN = set(gguf.GGMLQuantizationType.__members__)
"""Types of the installed gguf package; the first versions that are allowed lack the newest."""

UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def rounding_bound(raw: NDArray[np.uint8], kind: str, q: QuantTensor) -> NDArray[np.float64]:
    """How far weights may lie from gguf's: one rounding to fp16 of a scale and of an offset.

    Rounding moves a scale s by at most |s| 2^-11, or 2^-25 where it is subnormal, and the weight by
    (code - zero) times that; the float32 arithmetic adds a few ulps of its terms.
    """
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    _, scales, offsets = BLOCK_TYPES[kind].decode(raw.reshape(-1, nbytes))

    def per_weight(values: NDArray[np.float32]) -> NDArray[np.float64]:
        rows = np.abs(values.astype(np.float64)).reshape(q.m, -1)
        return np.repeat(rows, q.group_size, axis=1)

    steps = np.abs(q.codes - q.zero)
    bound = steps * (per_weight(scales) * 2**-11 + 2**-25)
    size = steps * per_weight(scales)
    if offsets is not None:
        bound += per_weight(offsets) * 2**-11 + 2**-25
        size += per_weight(offsets)
    return np.asarray(bound + 4 * 2**-24 * size)


def assert_equals_gguf(raw: NDArray[np.uint8], k: int, kind: str) -> QuantTensor:
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    q = decode_tensor(raw, k, BLOCK_TYPES[kind])
    got = q.dequantize()
    if kind in EXACT:
        assert np.array_equal(got, want)
    else:
        assert (np.abs(got - want) <= rounding_bound(raw, kind, q)).all()
    assert np.abs(want).max() > 0.01
    return q


@pytest.mark.parametrize("kind", EXACT + PRODUCTS)
def test_every_type_equals_ggufs_own_dequantisation(kind: str) -> None:
    w = np.random.default_rng(3).normal(0, 0.05, (7, 1024)).astype(np.float32)
    q = assert_equals_gguf(encode(w, kind, seed=4), 1024, kind)
    codes = 3 if kind in ("TQ1_0", "TQ2_0") else 2**q.bits
    assert len(np.unique(q.codes)) == codes or kind == "Q8_0"


@pytest.mark.parametrize("kind", EXACT + PRODUCTS)
def test_any_block_is_read(kind: str) -> None:
    """Random bytes, with scales of any kind that fp16 has."""
    q = assert_equals_gguf(random_blocks((64, 1024), kind, 5, EXTREME), 1024, kind)
    assert (q.bits, q.group_size) == (BLOCK_TYPES[kind].bits, BLOCK_TYPES[kind].group_size)
    assert q.encoding == ("ternary" if kind.startswith("TQ") else "uniform")


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", EXACT + PRODUCTS)
def test_scales_that_are_not_finite_are_refused(kind: str, bad: float) -> None:
    for start in HALVES[kind]:
        raw = random_blocks((4, 512), kind, 6)
        nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        blocks = raw.reshape(-1, nbytes)
        blocks[3, start : start + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match=r"(scale|offset) -?(inf|nan) is not a finite fp16"):
            decode_tensor(raw, 512, BLOCK_TYPES[kind])


@pytest.mark.parametrize("fp32", [False, True])
def test_q8_1_blocks_of_either_size(fp32: bool) -> None:
    """ggml-common.h: d, s = d * sum, 32 int8 codes; the two were fp32 in the first files."""
    rng = np.random.default_rng(7)
    d = rng.normal(0, 0.01, (6, 8)).astype(np.float16)
    d[0, :4] = [0, 2.0**-24, 2.0**-14, 100]
    codes = rng.integers(-128, 128, (6, 8, 32), np.int8)
    number = np.float32 if fp32 else np.float16
    sums = d.astype(np.float32) * codes.sum(axis=2, dtype=np.int32)
    head = np.stack([d.astype(number), sums.astype(number)], axis=2)
    raw = np.concatenate([head.view(np.uint8), codes.view(np.uint8)], axis=2).reshape(6, -1)
    q = decode_tensor(raw, 256, BLOCK_TYPES["Q8_1"])
    assert np.array_equal(q.codes, (codes.astype(int) + 128).reshape(6, -1))
    assert np.array_equal(q.dequantize(), (d[..., None] * codes.astype(np.float32)).reshape(6, -1))


def test_q8_k_blocks() -> None:
    """ggml-common.h: fp32 d, 256 int8 codes, 16 int16 sums of codes."""
    rng = np.random.default_rng(8)
    d = rng.normal(0, 0.01, (6, 2)).astype(np.float32)
    d[0, 0], d[1, 1] = 0, 1e-7
    codes = rng.integers(-128, 128, (6, 2, 256), np.int8)
    sums = codes.reshape(6, 2, 16, 16).sum(axis=3, dtype=np.int16)
    parts = [d[..., None].view(np.uint8), codes.view(np.uint8), sums.view(np.uint8)]
    raw = np.concatenate(parts, axis=2).reshape(6, -1)
    q = decode_tensor(raw, 512, BLOCK_TYPES["Q8_K"])
    want = (d[..., None].astype(np.float64) * codes).reshape(6, -1)
    assert (np.abs(q.dequantize() - want) <= rounding_bound(raw, "Q8_K", q)).all()
    assert np.array_equal(q.codes, (codes.astype(int) + 128).reshape(6, -1))
    raw[2, :4] = np.array([1e6], np.float32).view(np.uint8)
    with pytest.raises(ValueError, match=r"scale 1e\+06 is not a finite fp16 number"):
        decode_tensor(raw, 512, BLOCK_TYPES["Q8_K"])


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "TQ1_0"])
def test_rows_are_reordered_and_chunked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(5).normal(0, 0.05, (64, 256)).astype(np.float32)
    raw, order = encode(w, kind, seed=6), np.random.default_rng(7).permutation(64)
    whole = decode_tensor(raw, 256, BLOCK_TYPES[kind])
    monkeypatch.setattr("tmac_py.converters.gguf_types._CHUNK_ELEMENTS", 256 * 5)
    parts = decode_tensor(raw, 256, BLOCK_TYPES[kind], rows=order)
    assert whole.scales is not None
    assert parts.scales is not None
    assert np.array_equal(parts.codes, whole.codes[order])
    assert np.array_equal(parts.scales, whole.scales[order])


# Ternary types


def trits(m: int, k: int, seed: int = 9) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, (m, k), np.uint8)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_one_scale_of_all_blocks_is_stored_once(kind: str) -> None:
    codes = trits(5, 768)
    codes[2, 256:512] = 1  # a block of zeros, to which the writer gives the scale 0
    w = (codes.astype(np.float32) - 1) * np.float32(0.03)
    q = decode_tensor(encode(w, kind), 768, BLOCK_TYPES[kind])
    assert (q.scale, q.group_size, q.scales) == (float(np.float16(0.03)), 768, None)
    assert np.array_equal(q.codes, codes)
    w[4, :256] *= 2
    q = decode_tensor(encode(w, kind), 768, BLOCK_TYPES[kind])
    assert q.scale is None
    assert q.group_size == 256
    assert np.array_equal(q.codes, codes)


def test_a_code_that_is_no_trit_is_refused() -> None:
    raw = random_blocks((3, 512), "TQ2_0", 1)
    raw[1, 70] |= 0b00110000
    with pytest.raises(ValueError, match="code 3"):
        decode_tensor(raw, 512, BLOCK_TYPES["TQ2_0"])


def dequantise_i2_s(raw: NDArray[np.uint8], m: int, k: int) -> NDArray[np.float32]:
    """The format's description, value by value: 128 weights are 32 bytes, byte b holds v[b] << 6 |
    v[32 + b] << 4 | v[64 + b] << 2 | v[96 + b]; fp32 scale after m * k / 4 bytes."""
    out = np.empty(m * k, np.float32)
    scale = raw[m * k // 4 : m * k // 4 + 4].view("<f4")[0]
    for i in range(m * k):
        block, value = divmod(i, 128)
        field, byte = divmod(value, 32)
        code = int(raw[block * 32 + byte]) >> (6 - 2 * field) & 3
        out[i] = np.float32(code - 1) * scale
    return out.reshape(m, k)


@pytest.mark.parametrize("scale", [1.1875, 0.0, 1e-41, 3.0e38])
def test_i2_s_equals_its_description(scale: float) -> None:
    codes = trits(6, 384)
    raw = encode_i2_s(codes, scale)
    assert raw.nbytes == 6 * 384 // 4 + 32
    q = decode_i2_s(raw, (6, 384))
    assert np.array_equal(q.dequantize(), dequantise_i2_s(raw, 6, 384))
    assert np.array_equal(q.codes, codes)
    assert q.scale == np.float32(scale)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw.__setitem__(17, 0b11000000), "code 3 in I2_S: not the layout"),
        (lambda raw: raw.__setitem__(slice(-32, -28), (0, 0, 0xC0, 0x7F)), "scale nan of I2_S"),
        (lambda raw: raw.__setitem__(slice(-32, -28), (0, 0, 0x80, 0x7F)), "scale inf of I2_S"),
        (lambda raw: raw.__setitem__(slice(-32, -28), (0, 0, 0x80, 0xBF)), "scale -1 of I2_S"),
    ],
)
def test_i2_s_contents_that_are_refused(change: Any, text: str) -> None:
    raw = encode_i2_s(trits(4, 128), 1.0)
    change(raw)
    with pytest.raises(ValueError, match=text):
        decode_i2_s(raw, (4, 128))


def test_i2_s_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="k = 192, which is not a multiple of 128"):
        decode_i2_s(encode_i2_s(trits(4, 192).reshape(6, 128), 1.0), (4, 192))


# Whole files


def i2_s_file(path: Path) -> tuple[Path, dict[str, NDArray[np.uint8]]]:
    """A llama file with I2_S layers as bitnet.cpp writes it, and the codes in our row order."""
    weights, stored, codes = random_weights(TINY), {}, {}
    for seed, (name, w) in enumerate(weights.items()):
        if w.ndim == 1 or name in ("model.embed_tokens.weight", "lm_head.weight"):
            kind = "F32" if w.ndim == 1 else "F16"
            stored[gguf_name(name)] = (encode(w, kind), kind)
            continue
        codes[name] = trits(*w.shape, seed=seed)
        raw = encode_i2_s(to_gguf_order(name, codes[name], TINY), 0.5 + seed)
        stored[gguf_name(name)] = (raw, "I8")
    shapes = {gguf_name(name): weights[name].shape for name in codes}
    write_gguf(path, TINY, stored, shapes=shapes)
    for name in codes:
        set_type(path, gguf_name(name), 36)
    return path, codes


def test_i2_s_files_convert(tmp_path: Path) -> None:
    path, codes = i2_s_file(tmp_path / "m.gguf")
    for out in ("a.lut", "b.lut"):
        convert(path, tmp_path / out, head_bits=6)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    scales = {name: 0.5 + seed for seed, name in enumerate(random_weights(TINY))}
    with LutFile.open(tmp_path / "a.lut") as file:
        assert file.config.activation_bits == 8
        for name, want in codes.items():
            packed, spec = file.linear(name)
            assert (spec.layout, spec.scale) == ("trits3-m32", scales[name])
            got, _, _ = _core.unpack(
                packed,
                m=spec.m,
                k=spec.k,
                bits=2,
                group_size=spec.k,
                offset_kind="none",
                encoding="ternary",
                scale=spec.scale,
            )
            assert np.array_equal(got, want)


def test_i2_s_files_run_with_the_arithmetic_of_bitnet(tmp_path: Path) -> None:
    path = i2_s_file(tmp_path / "m.gguf")[0]
    convert(path, tmp_path / "m.lut")
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        assert model.tables == "exact8"
        logits = model.logits([3, 1, 4])
    assert np.isfinite(logits).all()
    with Model.load(tmp_path / "m.lut", threads=2, tables="exact8") as model:
        assert np.array_equal(model.logits([3, 1, 4]), logits)


BITS = {
    "Q4_0": 4 + 16 / 32,
    "Q5_1": 5 + 32 / 32,
    "Q8_0": 8 + 16 / 32,
    "Q2_K": 2 + 32 / 16,
    "Q3_K": 3 + 16 / 16,
    "Q4_K": 4 + 32 / 32,
    "Q5_K": 5 + 32 / 32,
    "Q6_K": 6 + 16 / 16,
    # 10 chunks of 24 weights in 5 bytes, 16 weights in 4 of those bytes; a scale
    "TQ1_0": (10 * 5 + 4 + 2) * 8 / 256,
    "TQ2_0": (10 * 5 + 4 + 2) * 8 / 256,
}
"""Codes, and scales and offsets of 16 bits, per weight."""


@pytest.mark.parametrize("kind", BITS)
def test_bits_are_reported_as_they_are_stored(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, kind)
    for name in ("token_embd.weight", "output.weight"):  # 40 rows would fill two tiles
        tensors[name] = (encode(np.ones((40, 256), np.float32), "Q8_0"), "Q8_0")
    path, out = write_gguf(tmp_path / "m.gguf", TINY, tensors), tmp_path / "m.lut"
    assert main.convert([str(path), str(out)]) == 0
    with LutFile.open(out) as file:
        linears = [entry for entry in file.tensors.values() if entry.kind == "linear"]
        for entry in linears:
            if "layers" in entry.name:
                assert entry.nbytes * 8 / np.prod(entry.shape) == BITS[kind]
        heads = 2 * 64 * 256  # tiles of 32 rows
        layers = sum(int(np.prod(e.shape)) for e in linears if "layers" in e.name)
        mean = (BITS[kind] * layers + 8.5 * heads) / (layers + 2 * 40 * 256)
    assert f", {mean:.3f} bits per weight" in capsys.readouterr().err


def test_type_36_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_0")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    set_type(path, gguf_name(UP), 36)  # as IQ4_NL_4_4 was stored
    with pytest.raises(
        UnsupportedError, match=r"ffn_up\.weight \[512, 256\] has type 36 and takes 73728 bytes; as"
    ):
        reader.read(path)


@pytest.mark.parametrize(("type_id", "kind"), [(38, "TL1"), (39, "TL2")])
def test_tiles_of_unknown_sizes_are_refused(tmp_path: Path, type_id: int, kind: str) -> None:
    path, _ = i2_s_file(tmp_path / "m.gguf")
    set_type(path, gguf_name(UP), type_id)
    with pytest.raises(UnsupportedError, match=rf"ffn_up\.weight is {kind} of bitnet\.cpp, whose"):
        convert(path, tmp_path / "m.lut")
    assert not (tmp_path / "m.lut").exists()


@pytest.mark.parametrize("nbytes", [36, 40, 44])
def test_q8_1_files_show_the_size_of_their_blocks(tmp_path: Path, nbytes: int) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (512, 8, nbytes), np.uint8)
    scale = np.array([0.25], np.float16 if nbytes == 36 else np.float32)
    raw[..., : scale.nbytes] = scale.view(np.uint8)
    tensors[gguf_name(UP)] = (raw.reshape(512, -1), "I8")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors, shapes={gguf_name(UP): (512, 256)})
    set_type(path, gguf_name(UP), 9)
    if nbytes == 44:
        with pytest.raises(UnsupportedError, match=r"ffn_up\.weight Q8_1 .* takes 180224 bytes"):
            reader.read(path)
        return
    q = next(t for t in reader.read(path).tensors if t.name == UP).load()
    assert isinstance(q, QuantTensor)
    codes = raw[..., nbytes - 32 :].view(np.int8).reshape(512, 256)
    assert np.array_equal(q.dequantize(), codes * np.float32(0.25))


@pytest.mark.parametrize("kind", [k for k in CODEBOOK_TYPES if k in KNOWN])
def test_codebooks_are_given_up_only_if_told_so(tmp_path: Path, kind: str) -> None:
    weights = random_weights(TINY)
    tensors = gguf_tensors(weights, TINY, "Q8_0")
    raw: dict[str, NDArray[np.uint8]] = {}
    for seed, name in enumerate((UP, Q)):
        shape = (weights[name].shape[0], 256)
        if kind == "MXFP4":
            raw[name] = encode(weights[name], kind)
        else:
            raw[name] = random_blocks(shape, kind, seed)
        if kind == "IQ1_M":  # the nibbles of its scale are the highest of four numbers
            blocks = raw[name].reshape(-1, 56)
            blocks[:, 49::2] = blocks[:, 49::2] & 15 | np.array([0, 0x10, 0x20, 0x20], np.uint8)
        tensors[gguf_name(name)] = (raw[name], kind)
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    with pytest.raises(UnsupportedError, match=rf"codes of .*{UP} {kind}.*--requantize") as caught:
        convert(path, tmp_path / "m.lut")
    assert Q in str(caught.value)
    assert not (tmp_path / "m.lut").exists()

    for out in ("m.lut", "n.lut"):
        convert(path, tmp_path / out, requantize=True, bits=5, group_size=64)
    assert (tmp_path / "m.lut").read_bytes() == (tmp_path / "n.lut").read_bytes()
    with LutFile.open(tmp_path / "m.lut") as file:
        for name in (UP, Q):
            dense = gguf.quants.dequantize(raw[name], gguf.GGMLQuantizationType[kind])
            assert np.isfinite(dense).all()
            if name == Q:  # from llama.cpp's order of rows: halves of a head alternate
                dense = dense.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
            want = quantize_rtn(dense, bits=5, group_size=64, asym=True, search="mse")
            packed, spec = file.linear(name)
            got = _core.unpack(
                packed, m=spec.m, k=spec.k, bits=5, group_size=64, offset_kind="offset"
            )
            assert np.array_equal(got[0], want.codes)
            assert np.array_equal(got[1], want.scales)
        assert file.linear("lm_head.weight")[1].bits == 8  # codes that can be kept are
        assert "bits=5" in file.source["quantised"]


def test_requantize_with_nothing_to_requantise_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_0")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    with pytest.raises(UnsupportedError, match="requantize would have no effect"):
        convert(path, tmp_path / "m.lut", requantize=True)


def test_codebook_values_that_are_not_finite_name_the_tensor(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    raw = random_blocks((512, 256), "IQ4_NL", 1)
    raw[7, :2] = np.array([np.inf], np.float16).view(np.uint8)
    tensors[gguf_name(UP)] = (raw, "IQ4_NL")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    with pytest.raises(ModelFileError, match=rf"tensor {UP}: weights are not finite"):
        convert(path, tmp_path / "m.lut", requantize=True)
    assert not (tmp_path / "m.lut").exists()


def test_codebook_rows_are_sliced() -> None:
    raw, order = random_blocks((64, 256), "IQ4_XS", 3), np.random.default_rng(4).permutation(64)
    whole = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.IQ4_XS)
    matrix = CodebookMatrix(raw, (64, 256), "IQ4_XS", order)
    assert np.array_equal(matrix[slice(10, 20)], whole[order[10:20]])


def test_every_listed_type_is_known_to_gguf() -> None:
    sizes = gguf.GGML_QUANT_SIZES
    for name, kind in BLOCK_TYPES.items():
        if name != "Q8_1":  # has the size of old files there
            assert sizes[gguf.GGMLQuantizationType[name]] == (kind.block, kind.nbytes)
    assert set(FLOAT_TYPES) <= KNOWN
    assert set(CODEBOOK_TYPES) - KNOWN <= {"MXFP4", "NVFP4"}
