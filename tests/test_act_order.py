"""Matrices whose columns stand in another order than the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from test_lutfile import change, join, split
from tiny_model import write_tiny_model
from tmac_py import LutLinear, Model, _core
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile
from tmac_py.packing import open_linear, pack
from tmac_py.quant import QuantTensor, quantize_rtn

IDS = np.random.default_rng(3).integers(0, 300, 40).astype(np.int32)
Q_PROJ = "model.layers.0.self_attn.q_proj"
Change = Callable[[str, QuantTensor], QuantTensor]


def shuffled(seed: int, k: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).permutation(k).astype(np.int32)


def whole_rows(_name: str, q: QuantTensor) -> QuantTensor:
    """One group a row, so that columns may change places."""
    return quantize_rtn(q.dequantize(), bits=q.bits, group_size=-1)


def reorder(q: QuantTensor, order: NDArray[np.int32]) -> QuantTensor:
    """The same matrix with columns in that order."""
    return replace(q, codes=np.ascontiguousarray(q.codes[:, order]), order=order)


SEEDS: dict[str, dict[str, int]] = {
    "all the same": dict.fromkeys(("q_", "k_", "v_", "o_", "gate", "up_", "down", "lm_head"), 1),
    "all different": {"q_": 1, "k_": 2, "v_": 3, "o_": 4, "gate": 5, "up_": 6, "down": 7},
    "two of three": {"q_": 1, "v_": 1, "up_": 2},
    "only outputs": {"o_": 1, "down": 2, "lm_head": 3},
}


def orders(seeds: dict[str, int]) -> Change:
    """Reorders the matrices whose names hold a key, by the seed there."""

    def with_order(name: str, q: QuantTensor) -> QuantTensor:
        q = whole_rows(name, q)
        found = [seed for key, seed in seeds.items() if key in name]
        return reorder(q, shuffled(found[0], q.k)) if found else q

    return with_order


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.lut"
    return write_tiny_model(path, change=whole_rows, tie_word_embeddings=False)


@pytest.mark.parametrize("n_tokens", [1, 4, 17, 40])
@pytest.mark.parametrize("seeds", SEEDS.values(), ids=SEEDS)
def test_a_model_in_another_order_is_the_same(
    tmp_path: Path, plain: Path, seeds: dict[str, int], n_tokens: int
) -> None:
    """Integer products of exact8 tables and rows of one group: the order changes no bit."""
    path = tmp_path / "m.lut"
    write_tiny_model(path, change=orders(seeds), tie_word_embeddings=False)
    with Model.load(plain, threads=2, tables="exact8") as model:
        want = model.logits(IDS)
    for threads in (1, 2, 3):
        with Model.load(path, threads=threads, tables="exact8") as model:
            cache = model.new_cache()
            parts = np.split(IDS, range(n_tokens, len(IDS), n_tokens))
            got = np.concatenate([model.forward(part, cache, "all") for part in parts])
        assert np.array_equal(got, want)


@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
def test_the_natural_order_is_none(tmp_path: Path, tables: Any) -> None:
    """Readers with it share no input with the others, but get the same one."""

    def natural(name: str, q: QuantTensor) -> QuantTensor:
        given = any(key in name for key in ("q_", "o_", "up_", "down", "lm_head"))
        return replace(q, order=np.arange(q.k, dtype=np.int32)) if given else q

    logits = []
    for name, edit in (("a", natural), ("b", lambda _name, q: q)):
        path = write_tiny_model(tmp_path / name, change=edit, tie_word_embeddings=False)
        with Model.load(path, threads=2, tables=tables) as model:
            logits.append(model.logits(IDS))
            cache = model.new_cache()
            logits.append(np.stack([model.forward([i], cache) for i in IDS[:20]]))
    assert np.array_equal(logits[0], logits[2])
    assert np.array_equal(logits[1], logits[3])


@pytest.mark.parametrize("tables", ["int8", "exact"])
def test_groups_stand_together_whatever_the_order(tables: Any) -> None:
    """Columns of a group that are anywhere in the row, as act-order leaves them."""
    rng = np.random.default_rng(0)
    order = shuffled(5, 96)
    w = rng.normal(size=(40, 96)).astype(np.float32)
    q = replace(quantize_rtn(w[:, order], bits=4, group_size=32, asym=True), order=order)
    step = np.abs(q.scales.astype(np.float32)).max()  # type: ignore[union-attr]
    assert np.abs(q.dequantize() - w).max() < 0.51 * step
    x = rng.normal(size=(20, 96)).astype(np.float32)
    unordered = LutLinear(replace(q, order=None), tables=tables, threads=2)
    for threads in (1, 2, 3):
        y = LutLinear(q, tables=tables, threads=threads)(x)
        assert np.array_equal(y, unordered(x[:, order]))
    want = x.astype(np.float64) @ q.dequantize().T
    assert np.square(y - want).sum() <= 1e-4 * np.square(want).sum()


def test_orders_that_are_none() -> None:
    q = quantize_rtn(np.ones((4, 8), np.float32), bits=4, group_size=8)
    good = np.arange(8, dtype=np.int32)
    for order, text in (
        (good.astype(np.int64), r"order int64\[8\]: int32\[8\] is needed"),
        (good[:7], r"order int32\[7\]"),
        (np.array([0, 1, 2, 3, 4, 5, 6, 6], np.int32), "order must hold each of 0 to 7 once"),
        (good + np.int32(1), "order must hold each of 0 to 7 once"),
    ):
        with pytest.raises(ValueError, match=text):
            replace(q, order=order)
    for order, text in (
        (good.astype(np.int64), "order must be of dtype int32"),
        (good[:7].copy(), r"order must be \[8\]"),
        (np.array([0, 1, 2, 3, 4, 5, 6, 6], np.int32), "once; entry 7 is 6"),
        (np.array([0, 1, -2, 3, 4, 5, 6, 7], np.int32), "entry 2 is -2"),
        (np.array([8, 1, 2, 3, 4, 5, 6, 7], np.int32), "each of 0 to 7 once; entry 0 is 8"),
    ):
        with pytest.raises(ValueError, match=text):
            open_linear(pack(q), q.spec, order)


def test_the_core_keeps_an_order_of_its_own() -> None:
    q = quantize_rtn(np.eye(8, dtype=np.float32), bits=4, group_size=8)
    order = np.arange(8, dtype=np.int32)[::-1].copy()
    linear, x = open_linear(pack(q), q.spec, order), np.arange(8, dtype=np.float32)[None]
    pool = _core.ThreadPool(1)
    want = _core.linear_forward(linear, x, pool, tables="exact")
    order[:] = 1 << 30
    assert np.array_equal(_core.linear_forward(linear, x, pool, tables="exact"), want)


@pytest.fixture
def lut(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m.lut", change=orders({"q_": 1, "down": 2}))


def test_a_file_carries_the_orders(lut: Path, tmp_path: Path) -> None:
    again = write_tiny_model(tmp_path / "again.lut", change=orders({"q_": 1, "down": 2}))
    assert lut.read_bytes() == again.read_bytes()
    with LutFile.open(lut) as file:
        assert file.metadata["tmac.format"] == "2"
        assert file.nbytes == lut.stat().st_size
        order = file.order(f"{Q_PROJ}.weight")
        assert order is not None
        assert np.array_equal(order, shuffled(1, 64))
        assert file.order("model.layers.0.self_attn.k_proj.weight") is None
        kinds = [entry.kind for entry in file.tensors.values()]
        assert kinds.count("order") == 4
        ranks = ["linear", "order", "float", "file"]
        assert kinds == sorted(kinds, key=ranks.index)


def test_a_file_without_orders_is_of_version_1(tmp_path: Path) -> None:
    with LutFile.open(write_tiny_model(tmp_path / "m.lut")) as file:
        assert file.metadata["tmac.format"] == "1"


def move(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)
    change(header, "tmac.tensors", lambda t: t.update({new: t.pop(old)}))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda h: move(h, f"{Q_PROJ}.order", "model.embed_tokens.order"),
            "unexpected model.embed_tokens.order",
        ),
        (lambda h: move(h, f"{Q_PROJ}.order", "model.norm.order"), "unexpected model.norm.order"),
        (
            lambda h: move(h, f"{Q_PROJ}.order", "model.layers.0.mlp.down_proj2.order"),
            "unexpected model.layers.0.mlp.down_proj2.order",
        ),
        (lambda h: h[f"{Q_PROJ}.order"].update(dtype="F32"), "dtype 'F32' is not allowed"),
        (lambda h: h[f"{Q_PROJ}.order"].update(shape=[2, 32]), "does not agree with its 256 bytes"),
        (lambda h: h[f"{Q_PROJ}.order"].update(shape=[63]), "does not agree with its 256 bytes"),
        (
            lambda h: change(h, "tmac.tensors", lambda t: t[f"{Q_PROJ}.order"].update(bits=4)),
            "unknown key bits",
        ),
    ],
)
def test_headers_with_orders_that_do_not_fit(
    lut: Path, edit: Callable[[dict[str, Any]], object], text: str
) -> None:
    header, data = split(lut)
    edit(header)
    join(lut, header, data)
    with pytest.raises(ModelFileError) as caught:
        LutFile.open(lut)
    assert str(caught.value).startswith(f"{lut}: ")
    assert text in str(caught.value)


def test_a_file_with_an_order_that_is_none(lut: Path) -> None:
    header, data = split(lut)
    begin, end = header[f"{Q_PROJ}.order"]["data_offsets"]
    broken = np.frombuffer(data[begin:end], np.int32).copy()
    broken[3] = broken[2]
    lut.write_bytes(lut.read_bytes().replace(data[begin:end], broken.tobytes()))
    with pytest.raises(ModelFileError, match=r"q_proj\.order"):
        Model.load(lut)
    with pytest.raises(ModelFileError, match=rf"^{lut}: tensor {Q_PROJ}\.weight: order must hold"):
        Model.load(lut, check=False)
