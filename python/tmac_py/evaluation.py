"""How well a model predicts a text, and how far it is from a reference: ``tmac-eval``'s measuring.

Perplexity is counted as llama-perplexity counts it: the text is cut into chunks, each chunk starts
anew, and only its later part is scored, so that every scored token has something before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.errors import ModelFileError, OptionError
from tmac_py.lutfile import LutFile
from tmac_py.model import Model
from tmac_py.tokenizer import Tokenizer

ROWS = 32
"""Positions whose log probabilities are computed at once."""

Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Chunking:
    """Which tokens of a text are scored, and with what before them.

    Without ``stride`` chunks of ``n_ctx`` tokens follow each other and the tokens of the second
    half are scored but its first. With one, chunks of ``n_ctx + stride // 2`` tokens start every
    ``stride`` tokens, and the last ``stride`` of each are scored. Both as in llama-perplexity.

    Raises OptionError for sizes that leave nothing to score.
    """

    n_ctx: int = 512
    stride: int = 0

    def __post_init__(self) -> None:
        if self.n_ctx < 4:
            raise OptionError(f"n_ctx is {self.n_ctx}; allowed: 4 up")
        if not 0 <= self.stride <= self.n_ctx:
            raise OptionError(
                f"the stride is {self.stride}; allowed: 0 (none) to {self.n_ctx}, the context"
            )

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self.n_ctx + self.stride // 2

    @property
    def first(self) -> int:
        """Place in the chunk of the first token that is scored; all after it are."""
        return self.size - self.stride if self.stride else self.n_ctx // 2 + 1

    @property
    def scored(self) -> int:
        """Tokens of a chunk that are scored."""
        return self.size - self.first

    def count(self, n_ids: int) -> int:
        """Chunks of a text of ``n_ids`` tokens; OptionError if it is shorter than two of them."""
        if n_ids < 2 * self.size:
            raise OptionError(
                f"the text has {n_ids} tokens; chunks of {self.size} need {2 * self.size} or more"
            )
        if self.stride:
            return math.ceil((n_ids - self.size) / self.stride)
        return n_ids // self.n_ctx

    def chunk(self, ids: Ids, index: int, bos: int | None = None) -> Ids:
        """The ids [size] of chunk ``index``; ``bos`` takes the place of the first one."""
        start = index * (self.stride or self.n_ctx)
        chunk: Ids = ids[start : start + self.size].copy()
        if bos is not None:
            chunk[0] = bos
        return chunk


class LogProbs(Protocol):
    """A source of next-token log probabilities: a model, or a file that stores a model's."""

    def blocks(self, index: int, ids: Ids, first: int) -> Iterator[Floats]:
        """Log probabilities float64 [r, vocab] of what may stand at each of ``ids[first:]``.

        In blocks of ROWS positions, the last one of what is left. ``index`` is that of the chunk.
        """


class ModelLogProbs:
    """Those of a model, for chunks of up to ``size`` tokens.

    Args:
        model: the model.
        size: tokens.
        kv: as for Model.new_cache.
        batch: tokens of a chunk that go through the model at once. Up to 16 each token gets what
            it gets in an answer, where tokens come one by one, bit for bit; above, it gets what the
            tokens of a prompt do, which with "int8" tables are rounded otherwise (docs/kernels.md).
    """

    def __init__(
        self, model: Model, size: int, kv: str = "f16", batch: int = PREFILL_CHUNK
    ) -> None:
        self._model = model
        self._batch = batch
        self._cache = model.new_cache(size, kv)

    def blocks(self, index: int, ids: Ids, first: int) -> Iterator[Floats]:  # noqa: ARG002
        """As LogProbs says; ``first`` is at least 1."""
        self._cache.truncate(0)
        forward, cache = self._model.forward, self._cache
        for part in slices(ids[: first - 1], self._batch):
            forward(part, cache)
        waiting: list[NDArray[np.float32]] = []
        for part in slices(ids[first - 1 : -1], self._batch):
            waiting.append(forward(part, cache, "all"))
            if sum(map(len, waiting)) >= ROWS:
                rows = np.concatenate(waiting)
                whole = len(rows) // ROWS * ROWS
                for row in range(0, whole, ROWS):
                    yield log_softmax(rows[row : row + ROWS])
                waiting = [rows[whole:]]
        if rest := [rows for rows in waiting if len(rows)]:
            yield log_softmax(np.concatenate(rest))


def slices(ids: Ids, batch: int) -> Iterator[Ids]:
    """``ids`` [n] in parts of up to ``batch``."""
    for start in range(0, len(ids), batch):
        yield ids[start : start + batch]


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Log probabilities float64 [..., vocab]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


@dataclass(frozen=True)
class ChunkScores:
    """What one chunk brought, a number for each scored token.

    Attributes:
        nll: negative log likelihood of the token.
        base_nll: the reference's; empty without one, as are the following.
        kld: KL divergence of the model's distribution from the reference's.
        same_top: 1 where both hold the same token for the likeliest.
    """

    nll: list[float]
    base_nll: list[float]
    kld: list[float]
    same_top: list[int]

    def check(self, scored: int, *, base: bool) -> None:
        """ValueError unless there are numbers for as many tokens, and of a reference if ``base``"""
        others = (self.base_nll, self.kld, self.same_top)
        if len(self.nll) != scored or any(len(one) != scored * base for one in others):
            raise ValueError("not the scores of this chunk")
        floats = (self.nll, self.base_nll, self.kld)
        if not all(type(x) is float for one in floats for x in one):
            raise ValueError("scores must be numbers")


def score_chunk(
    ids: Ids,
    first: int,
    ours: Iterable[Floats],
    theirs: Iterable[Floats] | None = None,
    keep: Callable[[Floats], None] | None = None,
) -> ChunkScores:
    """Compare what stands at ``ids[first:]`` with what was expected there, block by block.

    ``theirs`` are the reference's log probabilities. ``keep`` is called with each block of ours.
    """
    scores = ChunkScores([], [], [], [])
    others = iter(theirs) if theirs is not None else None
    for log_q in ours:
        if keep is not None:
            keep(log_q)
        rows = np.arange(len(log_q))
        begin = first + len(scores.nll)
        targets = ids[begin : begin + len(log_q)]
        scores.nll.extend((-log_q[rows, targets]).tolist())
        if others is not None:
            log_p = next(others)
            scores.base_nll.extend((-log_p[rows, targets]).tolist())
            # Rounding may leave a sum of nearly nothing below zero, which no divergence is.
            kld = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
            scores.kld.extend(kld.tolist())
            same = log_p.argmax(axis=1) == log_q.argmax(axis=1)
            scores.same_top.extend(same.astype(int).tolist())
    return scores


def score_chunks(
    ours: LogProbs,
    ids: Ids,
    chunking: Chunking,
    chunks: range,
    *,
    bos: int | None = None,
    reference: LogProbs | None = None,
    keep: Callable[[Floats], None] | None = None,
) -> Iterator[ChunkScores]:
    """Score the given ones of the chunks of a text ``ids`` [n], one after the other.

    Args:
        ours: the model.
        ids, bos: from :func:`encode_text`.
        chunking: how to cut the text.
        chunks: which chunks, within ``range(chunking.count(n))``.
        reference: what to compare with.
        keep: called with each block of log probabilities of the model.
    """
    for index in chunks:
        chunk = chunking.chunk(ids, index, bos)
        first = chunking.first
        theirs = None if reference is None else reference.blocks(index, chunk, first)
        yield score_chunk(chunk, first, ours.blocks(index, chunk, first), theirs, keep)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Floats) -> Estimate:
        """The mean of ``values`` [n], n >= 1."""
        n = len(values)
        error = float(values.std()) / math.sqrt(n - 1) if n > 1 else 0.0
        return cls(float(values.mean()), error)

    def exp(self) -> Estimate:
        """Of the exponential, to first order."""
        value = math.exp(self.value) if self.value < 700 else math.inf
        return Estimate(value, value * self.error)


@dataclass(frozen=True)
class Divergence:
    """How far the model is from the reference.

    Attributes:
        base_ppl: perplexity of the reference.
        log_ppl_ratio: logarithm of the model's perplexity over it.
        kld: KL divergence per token, mean.
        kld_median, kld_99, kld_999, kld_max: median, 99 % and 99.9 % quantiles, largest.
        delta_p: probability of the text's own token less the reference's, mean.
        rms_delta_p: root of the mean of its square.
        same_top: part of the places where both hold the same token for the likeliest.
    """

    base_ppl: Estimate
    log_ppl_ratio: Estimate
    kld: Estimate
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    delta_p: Estimate
    rms_delta_p: float
    same_top: Estimate


@dataclass(frozen=True)
class TextResult:
    """Perplexity over all scored tokens, and the divergence where there is a reference."""

    chunks: int
    tokens: int
    ppl: Estimate
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def summarise(chunks: Sequence[ChunkScores]) -> TextResult:
    """The numbers of all chunks together, of which there is at least one."""
    nll = _joined(chunks, "nll")
    divergence = None
    if chunks[0].base_nll:
        base, kld = _joined(chunks, "base_nll"), _joined(chunks, "kld")
        delta_p = np.exp(-nll) - np.exp(-base)
        median, q99, q999 = np.quantile(kld, (0.5, 0.99, 0.999)).tolist()
        divergence = Divergence(
            base_ppl=Estimate.of(base).exp(),
            log_ppl_ratio=Estimate.of(nll - base),
            kld=Estimate.of(kld),
            kld_median=median,
            kld_99=q99,
            kld_999=q999,
            kld_max=float(kld.max()),
            delta_p=Estimate.of(delta_p),
            rms_delta_p=float(np.sqrt(np.square(delta_p).mean())),
            same_top=Estimate.of(_joined(chunks, "same_top")),
        )
    return TextResult(len(chunks), len(nll), Estimate.of(nll).exp(), divergence)


def _joined(chunks: Sequence[ChunkScores], name: str) -> Floats:
    return np.concatenate([np.asarray(getattr(chunk, name), np.float64) for chunk in chunks])


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[Ids, int | None]:
    """Ids [n] of a whole text, and the token that starts every chunk: begin-of-text, or None."""
    ids = np.array(tokenizer.encode(text, parse_special=False), np.int32)
    prefix = tokenizer.encode("")
    return ids, prefix[0] if prefix else None


def fingerprint(file: LutFile) -> str:
    """Checksum of a model's configuration and of its tensors; 32 hexadecimal digits."""
    metadata = file.metadata
    return xxhash.xxh3_128_hexdigest(
        f"{metadata['tmac.config']}\n{metadata['tmac.tensors']}".encode()
    )


def check_vocabulary(model: Model, vocab_size: int, where: str) -> None:
    """ModelFileError unless the reference ``where`` has as many token ids as ``model``."""
    if model.config.vocab_size != vocab_size:
        raise ModelFileError(
            f"{where}: a vocabulary of {vocab_size} tokens, the model has {model.config.vocab_size}"
        )
