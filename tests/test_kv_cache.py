"""KV caches of every type: what they hold, how they are copied, and what they cost in quality."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny_model as tiny
from tmac_py import _core
from tmac_py.errors import OptionError
from tmac_py.model import Model

IDS = np.random.default_rng(7).integers(0, tiny.VOCAB, 60).astype(np.int32)
LONG = np.random.default_rng(8).integers(0, tiny.VOCAB, 700).astype(np.int32)
KV = ("f16", "int8", "int4", "int8/int4", "f16/int4")
ISAS = [row["name"] for row in _core.isas() if row["usable"]]

MOST_DIVERGENCE = {"int8": 1e-4, "int8/int4": 5e-3, "int4": 5e-3}
"""Mean KL divergence in nats from the answers with fp16 keys and values, on the default model's
text: what bench/kv_cache.py measures (docs/attention.md)."""

NEAR = 256
"""Newest positions that a cache has in fp16 beside their codes."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("kv") / "tiny.lut")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, threads=2) as model:
        yield model


def steps(model: Model, kv: str, ids: NDArray[np.int32] = IDS) -> NDArray[np.float32]:
    cache = model.new_cache(len(ids), kv)
    return np.stack([model.forward([token], cache) for token in ids])


@pytest.mark.parametrize("kv", KV)
def test_prefill_equals_single_steps(path: Path, kv: str) -> None:
    with Model.load(path, threads=2, tables="exact") as exact:
        whole = exact.forward(IDS, exact.new_cache(len(IDS), kv), "all")
        np.testing.assert_array_equal(whole, steps(exact, kv))


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("kv", KV)
def test_isa_and_threads_change_no_bit(path: Path, model: Model, kv: str) -> None:
    want = steps(model, kv)
    for isa, threads in itertools.product(ISAS, (1, 3)):
        _core.use_isa(isa)
        with Model.load(path, threads=threads) as other:
            np.testing.assert_array_equal(steps(other, kv), want)


@pytest.mark.parametrize("kv", ["f16", "int8/int4"])
def test_a_long_context_is_shared_out_by_position(tmp_path: Path, kv: str) -> None:
    """More positions than the threads keep to themselves: in steps by parts, in a pass by heads."""
    ids = np.resize(IDS, 1400)
    file = tiny.write_tiny_model(tmp_path / "long.lut", max_position_embeddings=len(ids))
    results = []
    for threads in (1, 2, 5):
        with Model.load(file, threads=threads, tables="exact") as model:
            cache = model.new_cache(len(ids), kv)
            model.forward(ids[:-3], cache)
            results.append(np.stack([model.forward([token], cache) for token in ids[-3:]]))
            whole = model.forward(ids, model.new_cache(len(ids), kv), "all")
            results.append(whole[-3:])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("kv", KV)
def test_bytes_are_as_computed(kv: str) -> None:
    keys, values = kv.split("/")[0], kv.split("/")[-1]
    bits = {"f16": 16.0, "int8": 8 + 32 / 32, "int4": 4 + 32 / 32}
    for n_ctx in (128, 1024):
        cache = _core.KvCache(
            n_layers=3, n_kv_heads=2, head_dim=64, n_ctx=n_ctx, keys=keys, values=values
        )
        assert (cache.keys, cache.values) == (keys, values)
        near = min(n_ctx, NEAR) * 2 * ((keys != "f16") + (values != "f16"))
        assert cache.nbytes == 3 * 2 * 64 * (n_ctx * (bits[keys] + bits[values]) / 8 + near)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("held", [1, 15, 16, 33])
def test_forks_and_states_go_on_as_the_original(model: Model, kv: str, held: int) -> None:
    cache = model.new_cache(len(IDS), kv)
    model.forward(IDS[:held], cache)
    fork, larger = cache.fork(), cache.fork(64)
    state = cache.state()
    restored = model.new_cache(len(IDS), kv)
    model.forward(IDS[5:30], restored)
    restored.restore(state)
    assert [c.pos for c in (fork, larger, restored)] == [held] * 3
    assert (fork.n_ctx, larger.n_ctx) == (len(IDS), 64)
    want = model.forward(IDS[held:], cache)
    for copy in (fork, larger, restored):
        np.testing.assert_array_equal(model.forward(IDS[held:], copy), want)
    assert restored.fork().state().tobytes() == cache.state().tobytes()


def test_a_state_depends_on_what_is_held_alone(model: Model) -> None:
    cache, other = model.new_cache(40), model.new_cache(64)
    model.forward(IDS[:20], cache)
    model.forward(np.concatenate([IDS[:20], IDS[:15]]), other)
    other.truncate(20)
    assert cache.state().tobytes() == other.state().tobytes()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Gives the same bits in passes of any length."""
    file = tmp_path_factory.mktemp("kv") / "exact.lut"
    tiny.write_tiny_model(file, max_position_embeddings=len(LONG))
    with Model.load(file, threads=2, tables="exact") as model:
        yield model


@pytest.mark.parametrize("kv", KV)
def test_passes_of_any_length_give_the_same_bits(exact: Model, kv: str) -> None:
    """Below, at and above what the positions in fp16 allow, from within a block on."""
    whole = exact.forward(LONG, exact.new_cache(len(LONG), kv), "all")
    for size in (37, 64, 300):
        cache = exact.new_cache(len(LONG), kv)
        parts = [exact.forward(LONG[i : i + size], cache, "all") for i in range(0, len(LONG), size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kv", KV)
def test_truncated_caches_go_on_as_shorter_ones(exact: Model, kv: str) -> None:
    """What is asked for is kept, or less: whole blocks of a cache with codes, if fp16 is gone."""
    whole = exact.forward(LONG, exact.new_cache(len(LONG), kv), "all")
    cache = exact.new_cache(len(LONG), kv)
    for asked in (650, 575, 460, 448, 447, 400, 320, 21, 0):
        exact.forward(LONG[cache.pos :], cache)
        cache.truncate(asked)
        kept = kv == "f16" or asked >= 704 - NEAR
        assert cache.pos == (asked if kept else asked // 64 * 64)
        rest = exact.forward(LONG[cache.pos : asked + 9], cache, "all")
        np.testing.assert_array_equal(rest, whole[asked + 9 - len(rest) : asked + 9])


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_copies_have_the_block_in_fp16_that_they_go_on_in(exact: Model, kv: str) -> None:
    whole = exact.forward(LONG, exact.new_cache(len(LONG), kv), "all")
    cache, restored = (exact.new_cache(len(LONG), kv) for _ in range(2))
    exact.forward(LONG[:470], cache)
    exact.forward(LONG[::-1], restored)
    restored.restore(cache.state())
    for copy in (cache, cache.fork(), restored):
        copy.truncate(455)
        assert copy.pos == 455
        np.testing.assert_array_equal(exact.forward(LONG[455:500], copy, "all"), whole[455:500])
    fork = cache.fork()
    fork.truncate(440)
    cache.truncate(440)
    assert (fork.pos, cache.pos) == (384, 440)


@pytest.mark.parametrize("kv", ["f16", "int4"])
def test_sessions_answer_the_same_after_they_forgot(exact: Model, kv: str) -> None:
    session, prompt = exact.new_session(kv=kv), LONG[:300].tolist()
    session.generate(LONG[:600].tolist(), max_tokens=2, temperature=0)
    answer = session.generate(prompt, max_tokens=5, temperature=0)
    fresh = exact.new_session(kv=kv).generate(prompt, max_tokens=5, temperature=0)
    assert answer.ids == fresh.ids
    session.generate(LONG[:600].tolist(), max_tokens=2, temperature=0)
    session.truncate(100)
    assert list(session.ids) == LONG[: 100 if kv == "f16" else 64].tolist()


def test_states_of_other_caches_are_refused(model: Model) -> None:
    cache = model.new_cache(32)
    model.forward(IDS[:20], cache)
    state = cache.state()
    wrong_magic = state.copy()
    wrong_magic[0] ^= 1
    shape = {"n_layers": 1, "n_kv_heads": 1, "head_dim": 8, "n_ctx": 32}
    for target, bad, message in (
        (model.new_cache(32, "int8"), state, "keys of 16 bits and values of 16"),
        (_core.KvCache(**shape), state, "another model"),
        (model.new_cache(19), state, "holds 20 tokens; this cache has room for 19"),
        (model.new_cache(32), state[:-1], "20 tokens has"),
        (model.new_cache(32), state[:10], "at least 64 bytes, not 10"),
        (model.new_cache(32), wrong_magic, "not the state of a KV cache"),
        (model.new_cache(32), state.view(np.int8), "dtype uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            target.restore(bad)
        assert target.pos == 0
    with pytest.raises(ValueError, match="does not fit into 19"):
        cache.fork(19)


@pytest.mark.parametrize("name", ["n_layers", "n_kv_heads", "head_dim", "n_ctx"])
def test_sizes_are_checked(name: str) -> None:
    sizes = {"n_layers": 1, "n_kv_heads": 1, "head_dim": 8, "n_ctx": 8}
    for size in (-1, 0, 2**24 + 1, 2**63 - 1):
        with pytest.raises(ValueError, match=f"must be 1 to 2.24, not {size}"):
            _core.KvCache(**{**sizes, name: size})


@pytest.mark.parametrize("kv", ["", "q8", "int8/", "int8/int4/f16", 8, None])
def test_unknown_types_are_named(model: Model, kv: object) -> None:
    with pytest.raises(OptionError, match=r"kv is .*; allowed: 'f16', 'int8', 'int4', or two"):
        model.new_cache(8, kv)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="kv is"):
        model.generate([1, 2], kv=kv, max_tokens=1)  # type: ignore[arg-type]


def test_caches_of_different_types_share_a_pass(model: Model) -> None:
    caches = [model.new_cache(16, kv) for kv in KV]
    together = model.forward_batch([[5]] * len(KV), caches)
    for kv, row in zip(KV, together, strict=True):
        np.testing.assert_array_equal(row, model.forward([5], model.new_cache(16, kv)))


@pytest.mark.parametrize("kv", MOST_DIVERGENCE)
def test_divergence_on_the_default_model(exact_model: Model, kv: str) -> None:
    text = (Path(__file__).parent / "golden" / "text-short.txt").read_text()
    ids = exact_model.tokenizer.encode(text, add_special=False)[:300]

    def scores(kind: str) -> NDArray[np.float64]:
        logits = exact_model.forward(ids, exact_model.new_cache(len(ids), kind), "all")
        wide = logits.astype(np.float64) - logits.max(1, keepdims=True)
        result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
        return result

    want, got = scores("f16"), scores(kv)
    divergence = (np.exp(want) * (want - got)).sum(1).mean()
    assert 0 < divergence <= MOST_DIVERGENCE[kv]
