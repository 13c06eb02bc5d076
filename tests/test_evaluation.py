"""Perplexity, divergence and stored log probabilities against their definitions in plain NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import tiny_model as tiny
from tiny_vocab import CHATML, byte_level_json
from tmac_py import Model
from tmac_py.errors import ModelFileError, OptionError
from tmac_py.evaluation import (
    Chunking,
    ChunkScores,
    Divergence,
    ModelLogProbs,
    encode_text,
    fingerprint,
    score_chunk,
    score_chunks,
    summarise,
)
from tmac_py.quant import QuantTensor
from tmac_py.stored_logits import LogitsInfo, LogitsWriter, StoredLogits

TEXT = "the cat sat on the mat. Hello world, low-bit models on the CPU! " * 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.write_tiny_model(tmp_path_factory.mktemp("eval") / "tiny.lut", change=milder)
    with Model.load(path, threads=2, tables="exact") as opened:
        yield opened


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.write_tiny_model(
        tmp_path_factory.mktemp("eval") / "other.lut", bits=2, change=milder
    )
    with Model.load(path, threads=1, tables="exact") as opened:
        yield opened


def milder(name: str, q: QuantTensor) -> QuantTensor:
    """Smaller scores, so that no token gets all of the probability."""
    return replace(q, scales=q.scales / np.float16(4)) if "embed" in name else q


def log_probs(logits: np.ndarray) -> np.ndarray:
    """Of each row, the slow way."""
    rows = []
    for row in np.asarray(logits, np.float64):
        shares = np.exp(row - row.max())
        rows.append(np.log(shares / shares.sum()))
    return np.array(rows)


def llama_perplexity_places(n_tokens: int, n_ctx: int, stride: int) -> list[list[tuple[int, int]]]:
    """For each chunk of llama-perplexity the tokens it scores, each with its chunk's start.

    Its loops: without a stride logits of the places n_ctx / 2 to n_ctx - 2 are compared with the
    token after each; with one the context grows by stride / 2, and the last ``stride`` count.
    """
    chunks = []
    if stride == 0:
        for i in range(n_tokens // n_ctx):
            first = n_ctx // 2
            places = range(first, n_ctx - 1)
            chunks.append([(i * n_ctx, i * n_ctx + j + 1) for j in places])
        return chunks
    n_ctx += stride // 2
    for i in range((n_tokens - n_ctx + stride - 1) // stride):
        places = range(n_ctx - stride - 1, n_ctx - 1)
        chunks.append([(i * stride, i * stride + j + 1) for j in places])
    return chunks


@pytest.mark.parametrize(
    ("n_tokens", "n_ctx", "stride"),
    [(100, 16, 0), (64, 32, 0), (47, 9, 0), (100, 16, 8), (101, 16, 8), (96, 16, 16), (40, 8, 3)],
)
def test_chunks_are_those_of_llama_perplexity(n_tokens: int, n_ctx: int, stride: int) -> None:
    chunking = Chunking(n_ctx, stride)
    ids = np.arange(n_tokens, dtype=np.int32)  # a token is its own place
    want = llama_perplexity_places(n_tokens, n_ctx, stride)
    assert chunking.count(n_tokens) == len(want)
    for i, places in enumerate(want):
        chunk = chunking.chunk(ids, i)
        assert len(chunk) == chunking.size
        assert chunk[0] == places[0][0]
        assert chunk[chunking.first :].tolist() == [place for _, place in places]
        assert chunking.scored == len(places)
        begun = chunking.chunk(ids, i, bos=7777)
        assert begun[0] == 7777
        assert begun[1:].tolist() == chunk[1:].tolist()
    assert ids[0] == 0  # of the text nothing was changed


@pytest.mark.parametrize("arguments", [(3,), (8, 9), (8, -1)])
def test_impossible_chunks(arguments: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="allowed"):
        Chunking(*arguments)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(OptionError, match="has 31 tokens; chunks of 16 need 32"):
        Chunking(16).count(31)


@pytest.mark.parametrize("stride", [0, 12])
def test_perplexity_and_divergence_by_definition(model: Model, other: Model, stride: int) -> None:
    ids, bos = encode_text(model.tokenizer, TEXT)
    assert bos is None
    chunking = Chunking(80 if stride == 0 else 74, stride)  # more than ROWS places of a chunk
    count = chunking.count(len(ids))
    assert count >= 2
    size = chunking.size
    scores = list(
        score_chunks(
            ModelLogProbs(model, size),
            ids,
            chunking,
            range(count),
            reference=ModelLogProbs(other, size),
        )
    )
    nll, base, kld, same = [], [], [], []
    for places in llama_perplexity_places(len(ids), chunking.n_ctx, stride):
        start = places[0][0]
        chunk = ids[start : start + size]
        log_q, log_p = log_probs(model.logits(chunk)), log_probs(other.logits(chunk))
        for _, place in places:
            q, p = log_q[place - start - 1], log_p[place - start - 1]
            nll.append(-q[ids[place]])
            base.append(-p[ids[place]])
            kld.append(sum(np.exp(p) * (p - q)))
            same.append(p.argmax() == q.argmax())
    result = summarise(scores)
    assert (result.chunks, result.tokens) == (count, len(nll))
    n = len(nll)
    assert result.ppl.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-9)
    error = np.exp(np.mean(nll)) * np.std(nll) / np.sqrt(n - 1)
    assert result.ppl.error == pytest.approx(error, rel=1e-9)
    found = result.divergence
    assert found is not None
    change = np.exp(-np.array(nll)) - np.exp(-np.array(base))
    for value, want in (
        (found.base_ppl.value, np.exp(np.mean(base))),
        (found.log_ppl_ratio.value, np.mean(nll) - np.mean(base)),
        (found.log_ppl_ratio.error, np.std(np.array(nll) - base) / np.sqrt(n - 1)),
        (found.kld.value, np.mean(kld)),
        (found.kld.error, np.std(kld) / np.sqrt(n - 1)),
        (found.kld_median, np.median(kld)),
        (found.kld_99, np.percentile(kld, 99)),
        (found.kld_999, np.percentile(kld, 99.9)),
        (found.kld_max, max(kld)),
        (found.delta_p.value, change.mean()),
        (found.rms_delta_p, np.sqrt((change**2).mean())),
        (found.same_top.value, np.mean(same)),
    ):
        assert value == pytest.approx(want, rel=1e-7)
    assert found.kld.value > 0.001
    assert 0 < found.same_top.value < 1


def test_a_model_does_not_differ_from_itself(model: Model) -> None:
    ids, _ = encode_text(model.tokenizer, TEXT)
    chunking = Chunking(40)
    both = ModelLogProbs(model, 40), ModelLogProbs(model, 40)
    found = summarise(
        list(score_chunks(both[0], ids, chunking, range(3), reference=both[1]))
    ).divergence
    assert isinstance(found, Divergence)
    assert (found.kld.value, found.kld_max, found.rms_delta_p) == (0, 0, 0)
    assert (found.same_top.value, found.log_ppl_ratio.value) == (1, 0)


@pytest.mark.parametrize("batch", [1, 7, 16, 64])
def test_small_batches_get_the_arithmetic_of_answers(model: Model, batch: int) -> None:
    with Model.load(model.path, threads=1, tables="int8") as int8:
        ids = encode_text(int8.tokenizer, TEXT)[0][:90]
        cache = int8.new_cache(90)
        alone = np.array([int8.forward([one], cache) for one in ids[:-1]])
        want = [log_probs(alone)[j, ids[j + 1]] for j in range(9, 89)]
        found = score_chunk(ids, 10, ModelLogProbs(int8, 90, batch=batch).blocks(0, ids, 10))
    if batch <= 16:
        assert found.nll == pytest.approx([-x for x in want], rel=1e-12)
    else:
        assert found.nll != pytest.approx([-x for x in want], rel=1e-6)


def test_each_chunk_begins_with_the_begin_of_text_token(tmp_path: Path) -> None:
    settings = {"add_bos_token": True, "bos_token": "<|im_start|>"}
    files = {
        "tokenizer.json": byte_level_json(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": CHATML.encode(),
    }
    path = tiny.write_tiny_model(tmp_path / "bos.lut", files=files)
    with Model.load(path, threads=1, tables="exact") as model:
        ids, bos = encode_text(model.tokenizer, TEXT)
        assert bos == model.tokenizer.id_of("<|im_start|>")
        assert ids[0] == bos
        (scores,) = score_chunks(ModelLogProbs(model, 32), ids, Chunking(32), range(1, 2), bos=bos)
        chunk = ids[32:64].copy()
        chunk[0] = bos
        want = log_probs(model.logits(chunk))
        assert scores.nll == pytest.approx([-want[j, chunk[j + 1]] for j in range(16, 31)])


def test_marks_in_a_text_are_text(model: Model) -> None:
    ids, _ = encode_text(model.tokenizer, "a <|im_end|> b")
    assert model.tokenizer.id_of("<|im_end|>") not in ids


def test_the_fingerprint_tells_models_apart(model: Model, other: Model, tmp_path: Path) -> None:
    again = tiny.write_tiny_model(tmp_path / "again.lut", change=milder)
    with Model.load(again, threads=1) as same:
        assert fingerprint(same.file) == fingerprint(model.file)
    assert fingerprint(other.file) != fingerprint(model.file)


def info_of(model: Model, chunking: Chunking) -> LogitsInfo:
    return LogitsInfo(
        TEXT, None, chunking.n_ctx, chunking.stride, "m", "f", model.tables, "f16", 256
    )


def store(model: Model, path: Path, chunking: Chunking, chunks: int) -> list[ChunkScores]:
    ids, _ = encode_text(model.tokenizer, TEXT)
    vocab = model.config.vocab_size
    ours = ModelLogProbs(model, chunking.size)
    with LogitsWriter(path, info_of(model, chunking), ids, chunks=chunks, vocab=vocab) as writer:
        return list(score_chunks(ours, ids, chunking, range(chunks), keep=writer.append))


def test_stored_log_probabilities_stand_for_the_model(model: Model, tmp_path: Path) -> None:
    path, chunking = tmp_path / "base.logits", Chunking(72)
    wanted = store(model, path, chunking, 2)
    stored = StoredLogits(path)
    assert stored.info == info_of(model, chunking)
    assert (stored.chunks, stored.vocab) == (2, tiny.VOCAB)
    assert list(tmp_path.iterdir()) == [path]
    # fp16 has 11 bits, so a log probability moves by up to 1/2048 of itself, and the sum that makes
    # a row whole by as much of the row's entropy, which is log(vocab) at most.
    error = {"rtol": 2**-11, "atol": np.log(tiny.VOCAB) * 2**-11}
    for index, scores in enumerate(wanted):
        chunk = chunking.chunk(stored.ids, index)
        log_q = log_probs(model.logits(chunk))[chunking.first - 1 : -1]
        log_p = np.concatenate(list(stored.blocks(index, chunk, chunking.first)))
        np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_allclose(log_p, log_q, **error)
        blocks = stored.blocks(index, chunk, chunking.first)
        ours = ModelLogProbs(model, 72).blocks(index, chunk, chunking.first)
        compared = score_chunk(chunk, chunking.first, ours, blocks)
        assert compared.nll == scores.nll
        assert 0 <= max(compared.kld) < 1e-5
    with safe_open(path, "numpy") as file:
        assert file.get_tensor("log_probs").shape == (2, chunking.scored, tiny.VOCAB)
        assert file.get_tensor("ids").tolist() == stored.ids.tolist()


def test_a_file_that_is_not_finished_does_not_appear(model: Model, tmp_path: Path) -> None:
    chunking, ids = Chunking(32), np.arange(64, dtype=np.int32)
    sizes = {"chunks": 2, "vocab": 5}
    info, path = info_of(model, chunking), tmp_path / "x.logits"
    with LogitsWriter(path, info, ids, **sizes) as writer:
        writer.append(np.zeros((15, 5)))
    assert list(tmp_path.iterdir()) == []
    with LogitsWriter(path, info, ids, keep=True, **sizes) as writer:
        writer.append(np.zeros((20, 5)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.logits.part"]
    with LogitsWriter(path, info, ids, keep=True, done=1, **sizes) as writer:
        writer.append(np.ones((15, 5)))
    assert list(tmp_path.iterdir()) == [path]
    assert StoredLogits(path).chunks == 2
    with pytest.raises(OptionError, match="remove its state file"):
        LogitsWriter(path, info, ids, done=1, **sizes)


def test_damaged_files_are_refused(model: Model, tmp_path: Path) -> None:
    path, chunking = tmp_path / "base.logits", Chunking(40)
    store(model, path, chunking, 1)
    sound = path.read_bytes()
    for content in (b"", b"text, no tensors at all", sound[:-1], sound[:200]):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"base\.logits"):
            StoredLogits(path)
    for old, new in (
        (b'"n_ctx": 40', b'"n_ctx": 42'),
        (b'"n_ctx": 40', b'"n_ctx": ""'),
        (b"probabilities 1", b"probabilities 2"),
        (b'"ids"', b'"idz"'),
    ):
        assert sound.count(old) == 1
        path.write_bytes(sound.replace(old, new))
        with pytest.raises(ModelFileError, match="not a file of tmac-eval --save-logits"):
            StoredLogits(path)
    path.write_bytes(sound[:-2] + b"\x00\x7e")
    stored = StoredLogits(path)
    with pytest.raises(ModelFileError, match="damaged: chunk 1 is not finite"):
        list(stored.blocks(0, chunking.chunk(stored.ids, 0), chunking.first))
