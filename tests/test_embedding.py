"""Embeddings: hidden states against transformers', pooling, batching."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_model as tiny
from parity import difference
from tmac_py import _core
from tmac_py.converters import convert
from tmac_py.embedding import Embedder, OnePooling, plan_passes, unit_length
from tmac_py.errors import ContextError, OptionError, TmacError
from tmac_py.model import Model
from tmac_py.packing import open_linear

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["the cat", "a story of rain " * 6, "x", "two words more", "and so on " * 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("embedding") / "tiny.lut"
    with Model.load(tiny.write_tiny_model(path, max_position_embeddings=400), threads=2) as model:
        yield model


@pytest.mark.parametrize("name", ["llama3", "linear", "mistral", "yarn", "dynamic"])
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of the golden models of test_transformers_parity.py, whose weights 8 bits hold exactly.

    Logits are products of hidden states with rows of much the same length, so that an error is as
    large a part of both; allowed is what the files name for logits, twice as there.
    """
    with np.load(GOLDEN / f"tiny-{name}.npz") as arrays:
        golden = dict(arrays)
    with np.load(GOLDEN / "hidden-states.npz") as arrays:
        theirs = arrays[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    for file, content in golden.items():
        if "." in file:
            (folder / file).write_bytes(content.tobytes())
    group_size = int(golden["group_size"])
    convert(folder, tmp_path / "m.lut", bits=8, head_bits=8, group_size=group_size)
    with Model.load(tmp_path / "m.lut", threads=2, tables="exact") as model:
        ids = golden["ids"]
        [ours] = model.embed(ids, pooling="none", normalize=False)
        allowed = 2 * float(golden["exact_error"]) / golden["logits"].std()
        assert difference(ours, theirs).max() < allowed * theirs.std()
        assert allowed < 0.01
        for pooling, want in (
            ("mean", theirs.mean(axis=0)),
            ("last", theirs[-1]),
            ("cls", theirs[0]),
        ):
            [found] = model.embed(ids, pooling=pooling)
            assert found.dtype == np.float32
            assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
            assert np.linalg.norm(found - unit_length(want)) < allowed


@pytest.mark.parametrize("threads", [1, 3])
def test_the_head_makes_logits_of_hidden_states(model: Model, threads: int) -> None:
    """Bit by bit, of several sequences and of one, of few tokens and of many."""
    packed, spec = model.file.linear("model.embed_tokens.weight")
    head, pool = open_linear(packed, spec), _core.ThreadPool(threads)
    with Model.load(model.path, threads=threads) as other:
        for lengths in ((1,), (3, 9), (40,), (70, 30)):
            ids = [(7 * np.arange(n) + n) % tiny.VOCAB for n in lengths]
            states = other.hidden_states(ids, [other.new_cache(n) for n in lengths])
            assert [part.shape for part in states] == [(n, 64) for n in lengths]
            rows = other.forward_batch(ids, [other.new_cache(n) for n in lengths], "all")
            found = _core.linear_forward(head, np.concatenate(states), pool, tables="int8")
            np.testing.assert_array_equal(found, np.concatenate(rows))


def test_a_cache_goes_on_after_hidden_states(model: Model) -> None:
    plain, mixed = model.new_cache(8), model.new_cache(8)
    model.forward([5, 6, 7], plain)
    model.hidden_states([[5, 6, 7]], [mixed])
    np.testing.assert_array_equal(model.forward([8], plain), model.forward([8], mixed))
    with pytest.raises(ContextError, match="5 tokens do not fit"):
        model.hidden_states([[1, 2, 3, 4, 5]], [mixed])
    assert mixed.pos == 4


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_a_text_has_the_same_embedding_in_any_company(model: Model, pooling: OnePooling) -> None:
    together = model.embed(WORDS, pooling=pooling)
    assert together.shape == (len(WORDS), 64)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, row in zip(WORDS, together, strict=True):
        np.testing.assert_array_equal(model.embed(text, pooling=pooling)[0], row)
        ids = model.tokenizer.encode(text)
        np.testing.assert_array_equal(model.embed(ids, pooling=pooling)[0], row)
        np.testing.assert_array_equal(model.embed([text, ids][::-1], pooling=pooling)[0], row)
    for chunk in (1, 50, 96):
        texts = [model.check_prompt(text) for text in WORDS]
        work = Embedder(model, texts, pooling=pooling, chunk=chunk)
        passes = [*iter(work.step, 0)]
        assert sum(passes) == work.n_tokens == sum(map(len, texts))
        assert max(passes) <= max(chunk, 34)
        np.testing.assert_array_equal(np.stack(work.vectors), together)


def test_pooling(model: Model) -> None:
    for text, states in zip(
        WORDS, model.embed(WORDS, pooling="none", normalize=False), strict=True
    ):
        ids = model.check_prompt(text)
        [want] = model.hidden_states([ids], [model.new_cache(len(ids))])
        np.testing.assert_array_equal(states, want)
        for pooling, vector in (
            ("mean", want.mean(axis=0, dtype=np.float64)),
            ("last", want[-1]),
            ("cls", want[0]),
        ):
            [found] = model.embed([text], pooling=pooling, normalize=False)
            np.testing.assert_allclose(found, vector, rtol=1e-6, atol=1e-7)
            [found] = model.embed([text], pooling=pooling)
            np.testing.assert_allclose(found, vector / np.linalg.norm(vector), rtol=1e-5, atol=1e-7)
        [rows] = model.embed(text, pooling="none")
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert not unit_length(np.zeros(3)).any()


def test_long_passes_are_no_exception(tmp_path: Path) -> None:
    """The core works on 512 tokens at once: it would leave the last 8 of 520 alone."""
    path = tiny.write_tiny_model(tmp_path / "long.lut", max_position_embeddings=520)
    text = np.random.default_rng(4).integers(0, tiny.VOCAB, 520).astype(np.int32)
    with Model.load(path, threads=2) as model:
        work = Embedder(model, [text], pooling="none", chunk=520)
        while work.step():
            pass
        np.testing.assert_array_equal(work.vectors[0], model.embed(text, pooling="none")[0])


@pytest.mark.parametrize("chunk", [1, 34, 64, 256])
def test_passes_hold_each_token_once_and_never_few_of_a_long_text(chunk: int) -> None:
    random = np.random.default_rng(chunk)
    for _ in range(50):
        lengths = random.integers(1, 150, random.integers(1, 12)).tolist()
        done = [0] * len(lengths)
        for parts in plan_passes(lengths, chunk):
            sizes = [end - begin for _, begin, end in parts]
            assert len({i for i, _, _ in parts}) == len(parts), "a text is once in a pass"
            if lengths[parts[0][0]] <= 16:
                assert sum(sizes) <= 16
            else:
                assert min(sizes) > 16
                assert sum(sizes) <= max(chunk, 34)
            for i, begin, end in parts:
                assert begin == done[i]
                done[i] = end
        assert done == lengths


def test_what_cannot_be_embedded(model: Model) -> None:
    for texts, text in (
        ([], "there is no text"),
        ("", "the prompt has no tokens"),
        (["a", ""], "the prompt has no tokens"),
        ([[5], [tiny.VOCAB]], "outside the vocabulary"),
        ([0.5], "must be a sequence of integers"),
        ({"a": 1}, "allowed: a text, token ids"),
    ):
        with pytest.raises(OptionError, match=text):
            model.embed(texts)
    with pytest.raises(OptionError, match="pooling is 'max'; allowed: 'mean', 'last', 'cls', 'no"):
        model.embed("a", pooling="max")
    with pytest.raises(ContextError, match="text 1 has 401 tokens, the context holds 400"):
        model.embed([[5], [5] * 401])
    with Model.load(model.path) as other:
        other.close()
        with pytest.raises(TmacError, match="is closed"):
            other.embed([[5]])
