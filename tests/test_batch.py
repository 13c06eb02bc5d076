"""Several sequences in one pass over the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py import _core
from tmac_py.errors import ContextError, OptionError
from tmac_py.model import Model

PROMPTS = [np.random.default_rng(i).integers(0, tiny.VOCAB, 3 + 4 * i) for i in range(4)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("batch") / "tiny.lut")


def caches_after(model: Model, prompts: list[np.ndarray]) -> list[_core.KvCache]:
    caches = [model.new_cache(64) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.forward(prompt, cache)
    return caches


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tables", ["int8", "exact"])
def test_sequences_get_together_what_they_get_alone(path: Path, tables: str, threads: int) -> None:
    with Model.load(path, threads=threads, tables=tables) as model:
        alone, together = caches_after(model, PROMPTS), caches_after(model, PROMPTS)
        for step in range(5):
            ids = [(7 * step + 3 * i) % tiny.VOCAB for i in range(len(PROMPTS))]
            rows = model.forward_batch([[token] for token in ids], together)
            for token, cache, row in zip(ids, alone, rows, strict=True):
                np.testing.assert_array_equal(row, model.forward([token], cache))
        assert [cache.pos for cache in together] == [len(prompt) + 5 for prompt in PROMPTS]


@pytest.mark.parametrize("logits", ["last", "all"])
def test_sequences_of_several_tokens_share_a_pass(path: Path, logits: str) -> None:
    parts = [PROMPTS[0][:3], PROMPTS[1][:1], PROMPTS[2][:6], PROMPTS[3][:5]]
    with Model.load(path, threads=2) as model:
        rows = model.forward_batch(parts, [model.new_cache(8) for _ in parts], logits)
        for part, row in zip(parts, rows, strict=True):
            np.testing.assert_array_equal(row, model.forward(part, model.new_cache(8), logits))


def test_a_long_prompt_beside_a_single_token(path: Path) -> None:
    """More ids than pass through the layers at once, in sequences that end within a pass."""
    with Model.load(path, threads=2, tables="exact") as model:
        lengths = [model.n_ctx, 1, 40, model.n_ctx, model.n_ctx]
        parts = [np.arange(length) % tiny.VOCAB for length in lengths]
        rows = model.forward_batch(parts, [model.new_cache(len(part)) for part in parts], "all")
        for part, row in zip(parts, rows, strict=True):
            want = model.forward(part, model.new_cache(len(part)), "all")
            assert row.shape == want.shape
            assert np.abs(row - want).max() <= 1e-3 * np.abs(want).max()


def test_a_batch_that_cannot_run_changes_no_cache(path: Path) -> None:
    with Model.load(path, threads=1) as model:
        caches = [model.new_cache(4), model.new_cache(4)]
        with pytest.raises(ContextError, match="5 tokens do not fit"):
            model.forward_batch([[1, 2], [1, 2, 3, 4, 5]], caches)
        with pytest.raises(OptionError, match="sequences 0 and 1 have the same KV cache"):
            model.forward_batch([[1], [2]], [caches[0], caches[0]])
        with pytest.raises(OptionError, match="2 sequences of ids and 1 caches"):
            model.forward_batch([[1], [2]], caches[:1])
        with pytest.raises(OptionError, match="outside the vocabulary"):
            model.forward_batch([[1], [tiny.VOCAB]], caches)
        with pytest.raises(OptionError, match="0 sequences"):
            model.forward_batch([], [])
        assert [cache.pos for cache in caches] == [0, 0]
        model.forward_batch([[1], [2]], caches)
        assert [cache.pos for cache in caches] == [1, 1]
