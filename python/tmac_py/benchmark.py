"""How fast a model runs here, beside what the machine allows: the measuring behind ``tmac-bench``.

Every measurement states the limit taken in the same run: decoding reads all weights for each token,
so its limit is the read bandwidth of memory; prefill is bound by int8 multiply-adds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np

from tmac_py import _core
from tmac_py.decoding import prefill
from tmac_py.errors import ContextError, OptionError
from tmac_py.lutfile import LutFile
from tmac_py.model import Model
from tmac_py.pool import thread_pool
from tmac_py.spec import Tables

_BANDWIDTH_BYTES = 1 << 28
"""Read to measure the bandwidth: more than most last-level caches hold."""


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt of ``n_prompt`` tokens, then ``n_gen`` tokens one by one.

    Both may follow ``depth`` tokens that are in the KV cache before the clock starts.
    """

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128, pp512+tg128, tg128 @ d4096."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (
            self.n_gen > 0
        )
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen


@dataclass(frozen=True)
class Measurement:
    """One workload on one model with one number of threads.

    Attributes:
        workload: what was timed.
        threads, isa, tables: how.
        samples: seconds of each repetition.
        bandwidth: bytes per second that the same threads read from memory, before each repetition:
            the median.
        peak: int8 multiply-adds per second of the same threads, likewise.
        weight_bytes: packed bytes that a token reads.
        products: multiply-adds of a token of a prompt, whose logits are not computed.
    """

    workload: Workload
    threads: int
    isa: str
    tables: Tables
    samples: tuple[float, ...]
    bandwidth: float
    peak: float
    weight_bytes: int
    products: int

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.workload.tokens / seconds for seconds in self.samples]

    @property
    def rate(self) -> float:
        """Tokens per second: the median."""
        return statistics.median(self.rates)

    @property
    def weight_rate(self) -> float | None:
        """Bytes of weights read per second; None where a prompt is part of the time."""
        return None if self.workload.n_prompt else self.rate * self.weight_bytes

    @property
    def limit_share(self) -> float | None:
        """Of the bandwidth when decoding, of the multiply peak in prefill; None for both in one."""
        if self.workload.n_prompt and self.workload.n_gen:
            return None
        if self.workload.n_prompt:
            return self.rate * self.products / self.peak
        return self.rate * self.weight_bytes / self.bandwidth


def weight_bytes(file: LutFile) -> int:
    """Packed bytes of the matrices that a token reads: all but an embedding of its own.

    Of experts those that it chooses, on average.
    """
    return round(
        sum(
            entry.nbytes * _share(file, entry.name)
            for entry in file.tensors.values()
            if entry.kind == "linear"
            and (file.config.tie_word_embeddings or entry.name != "model.embed_tokens.weight")
        )
    )


def weight_count(file: LutFile) -> int:
    """Weights of all matrices."""
    return sum(m * k for m, k in _shapes(file).values())


def layer_products(file: LutFile) -> int:
    """Multiply-adds of one token in the matrices of the layers: all but embedding and head."""
    return round(
        sum(
            m * k * _share(file, name)
            for name, (m, k) in _shapes(file).items()
            if name.startswith("model.layers.")
        )
    )


def _share(file: LutFile, name: str) -> Fraction:
    """The part of tokens that a matrix is read for, if all experts are chosen as often."""
    config = file.config
    if ".experts." not in name:
        return Fraction(1)
    return Fraction(config.num_experts_per_tok, config.num_experts)


def _shapes(file: LutFile) -> dict[str, tuple[int, int]]:
    return {
        entry.name: (entry.shape[0], entry.shape[1])
        for entry in file.tensors.values()
        if entry.kind == "linear"
    }


def measure(
    path: Path,
    workloads: Sequence[Workload],
    *,
    threads: Sequence[int],
    repetitions: int = 5,
    tables: Tables | None = None,
    isa: str | None = None,
) -> Iterator[Measurement]:
    """Time each workload with each number of threads, one measurement after the other.

    Args:
        path: a .lut file.
        workloads: what to time; each of at least one token.
        threads: numbers of threads.
        repetitions: of each workload, after one that is not counted.
        tables: lookup tables, None for the model's own.
        isa: instruction set, None for the one in use.

    Raises:
        ContextError: a workload does not fit the model's context.
        OptionError: an argument is not allowed.
        ModelFileError: the model cannot be loaded.
    """
    if repetitions < 1:
        raise OptionError(f"repetitions is {repetitions}; allowed: at least 1")
    for workload in workloads:
        if workload.tokens < 1 or min(workload.n_prompt, workload.n_gen, workload.depth) < 0:
            raise OptionError(f"{workload} has no tokens; allowed: at least one, none negative")
    if isa is not None:
        try:
            _core.use_isa(isa)
        except ValueError as error:
            raise OptionError(str(error)) from error
    for number in threads:
        with Model.load(path, threads=number, tables=tables, check=False) as model:
            for workload in workloads:
                yield _measure(model, workload, repetitions)


def _measure(model: Model, workload: Workload, repetitions: int) -> Measurement:
    size = workload.depth + workload.tokens
    if size > model.n_ctx:
        raise ContextError(
            f"{workload.name} needs {size} tokens of context, the model has {model.n_ctx}"
        )
    pool = thread_pool(model.threads)
    cache = model.new_cache(size)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, size, dtype=np.int32)
    if workload.depth:
        prefill(model.forward, cache, ids[: workload.depth])
    samples, bandwidths, peaks = [], [], []
    for repetition in range(repetitions + 1):
        bandwidths.append(_core.read_bandwidth(_BANDWIDTH_BYTES, pool) * 1e9)
        peaks.append(_core.multiply_peak(pool))
        cache.truncate(workload.depth)
        prompt_end = workload.depth + workload.n_prompt
        started = perf_counter()
        if workload.n_prompt:
            prefill(model.forward, cache, ids[workload.depth : prompt_end])
        for i in range(prompt_end, size):
            model.forward(ids[i : i + 1], cache)
        if repetition > 0:
            samples.append(perf_counter() - started)
    file = model.file
    return Measurement(
        workload,
        model.threads,
        _core.active_isa(),
        model.tables,
        tuple(samples),
        statistics.median(bandwidths),
        statistics.median(peaks),
        weight_bytes(file),
        layer_products(file),
    )


def profile(model: Model, n_gen: int, depth: int = 0) -> dict[str, float]:
    """Seconds of each part of a decode step after ``depth`` tokens: the mean of ``n_gen`` steps.

    Raises ContextError where these do not fit the model's context.
    """
    cache = model.new_cache(depth + n_gen + 1)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, depth + n_gen + 1)
    prefill(model.forward, cache, ids[: depth + 1].astype(np.int32))
    times = _core.StepTimes()
    for i in range(depth + 1, depth + n_gen + 1):
        model.forward_batch([ids[i : i + 1]], [cache], times=times)
    return {part: seconds / n_gen for part, seconds in times.seconds.items() if seconds > 0}


def peak_memory_bytes() -> int | None:
    """The most memory this process has had resident so far, mapped files included."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
