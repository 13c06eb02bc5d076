"""How fast a model runs here, beside what the machine allows: the measuring behind ``tmac-bench``.

Every measurement states the limit taken in the same run: decoding reads all weights for each token,
so its limit is the read bandwidth of memory; prefill is bound by int8 multiply-adds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np

from tmac_py import _core
from tmac_py.checks import check_kv
from tmac_py.decoding import prefill
from tmac_py.errors import ContextError, OptionError
from tmac_py.lutfile import LutFile
from tmac_py.model import Model
from tmac_py.pool import thread_pool
from tmac_py.sensors import EnergyMeter, PeakMemory
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
class Setting:
    """How a model runs.

    Attributes:
        threads: number of threads.
        isa: instruction set, None for the one in use.
        tables: lookup tables, None for the model's own.
        kv: how keys and values are stored, as for Model.new_cache.
    """

    threads: int
    isa: str | None = None
    tables: Tables | None = None
    kv: str = "f16"


@dataclass(frozen=True)
class Measurement:
    """One workload on one model with one setting.

    Attributes:
        workload: what was timed.
        threads, isa, tables, kv: how.
        samples: seconds of each repetition.
        first_tokens: seconds of each repetition from the start of its prompt until the scores of
            the first token of an answer were there; none without a prompt.
        load_seconds: from the file to a model that can compute, its checksums verified.
        peak_memory: the most bytes resident while the model was loaded and ran, mapped files
            included; where the system cannot forget earlier peaks, since the process began.
        joules: energy of one repetition more, None without a sensor.
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
    kv: str
    samples: tuple[float, ...]
    first_tokens: tuple[float, ...]
    load_seconds: float
    peak_memory: int | None
    joules: float | None
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
    def first_token(self) -> float | None:
        """Seconds to the first token: the median; None without a prompt."""
        return statistics.median(self.first_tokens) if self.first_tokens else None

    @property
    def joules_per_token(self) -> float | None:
        """Of the tokens of the workload, prompt and answer alike; None without a sensor."""
        return None if self.joules is None else self.joules / self.workload.tokens

    @property
    def limit(self) -> float | None:
        """Tokens per second at the whole bandwidth or multiply peak, as :attr:`limit_share`."""
        if self.workload.n_prompt and self.workload.n_gen:
            return None
        if self.workload.n_prompt:
            return self.peak / self.products
        return self.bandwidth / self.weight_bytes

    @property
    def weight_rate(self) -> float | None:
        """Bytes of weights read per second; None where a prompt is part of the time."""
        return None if self.workload.n_prompt else self.rate * self.weight_bytes

    @property
    def limit_share(self) -> float | None:
        """Of the bandwidth when decoding, of the multiply peak in prefill; None for both in one."""
        return None if self.limit is None else self.rate / self.limit


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
    settings: Sequence[Setting],
    *,
    repetitions: int = 5,
    meter: EnergyMeter | None = None,
) -> Iterator[Measurement]:
    """Time each workload with each setting, one measurement after the other.

    Args:
        path: a .lut file.
        workloads: what to time; each of at least one token.
        settings: how.
        repetitions: of each workload, after one that is not counted.
        meter: a sensor of energy, see :func:`tmac_py.sensors.find_energy_meter`.

    Raises:
        ContextError: a workload does not fit the model's context.
        OptionError: an argument is not allowed.
        ModelFileError: the model cannot be loaded.
    """
    _check(path, workloads, settings, repetitions)
    for setting in settings:
        memory, started = PeakMemory(), perf_counter()
        with load(path, setting) as model:
            load_seconds, load_memory = perf_counter() - started, memory.nbytes()
            for workload in workloads:
                run = _Run(model, workload, setting.kv, meter)
                yield run.measure(repetitions, load_seconds, load_memory)


@contextmanager
def load(path: Path, setting: Setting) -> Iterator[Model]:
    """A model as ``setting`` says; the instruction set in use is the same afterwards.

    Raises:
        OptionError: the setting is not allowed.
        ModelFileError: the model cannot be loaded.
    """
    before = _core.active_isa()
    try:
        if setting.isa is not None:
            _core.use_isa(setting.isa)
        with Model.load(path, threads=setting.threads, tables=setting.tables) as model:
            yield model
    finally:
        _core.use_isa(before)


def _check(
    path: Path, workloads: Sequence[Workload], settings: Sequence[Setting], repetitions: int
) -> None:
    """Refuse what would fail, before anything is measured."""
    if repetitions < 1:
        raise OptionError(f"repetitions is {repetitions}; allowed: at least 1")
    usable = [isa["name"] for isa in _core.isas() if isa["usable"]]
    for setting in settings:
        check_kv(setting.kv)
        if setting.isa is not None and setting.isa not in usable:
            raise OptionError(f"isa is {setting.isa!r}; allowed here: {', '.join(usable)}")
    with LutFile.open(path, check=False) as file:
        n_ctx = file.config.max_position_embeddings
    for workload in workloads:
        if workload.tokens < 1 or min(workload.n_prompt, workload.n_gen, workload.depth) < 0:
            raise OptionError(f"{workload} has no tokens; allowed: at least one, none negative")
        if workload.depth + workload.tokens > n_ctx:
            raise ContextError(
                f"{workload.name} needs {workload.depth + workload.tokens} tokens of context, "
                f"the model has {n_ctx}"
            )


class _Run:
    """A workload on a loaded model, with a cache of its own."""

    def __init__(
        self, model: Model, workload: Workload, kv: str, meter: EnergyMeter | None
    ) -> None:
        self._model, self._workload, self._kv, self._meter = model, workload, kv, meter
        size = workload.depth + workload.tokens
        self._cache = model.new_cache(size, kv)
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, model.config.vocab_size, size, dtype=np.int32)
        if workload.depth:
            prefill(model.forward, self._cache, self._ids[: workload.depth])

    def measure(
        self, repetitions: int, load_seconds: float, load_memory: int | None
    ) -> Measurement:
        """Time the workload, each repetition after the limits of the machine."""
        pool = thread_pool(self._model.threads)
        samples, bandwidths, peaks = [], [], []
        peak_memory = [load_memory]
        for _ in range(repetitions + 1):
            bandwidths.append(_core.read_bandwidth(_BANDWIDTH_BYTES, pool) * 1e9)
            peaks.append(_core.multiply_peak(pool))
            memory = PeakMemory()
            samples.append(self._once())
            peak_memory.append(memory.nbytes())
        joules = None if self._meter is None else self._meter.joules(self._once)
        file, has_prompt = self._model.file, self._workload.n_prompt > 0
        return Measurement(
            self._workload,
            self._model.threads,
            _core.active_isa(),
            self._model.tables,
            self._kv,
            tuple(whole for _, whole in samples[1:]),
            tuple(first for first, _ in samples[1:] if has_prompt),
            load_seconds,
            max((most for most in peak_memory if most is not None), default=None),
            joules,
            statistics.median(bandwidths),
            statistics.median(peaks),
            weight_bytes(file),
            layer_products(file),
        )

    def _once(self) -> tuple[float, float]:
        """Seconds until the prompt is done, and until all is."""
        model, workload, cache, ids = self._model, self._workload, self._cache, self._ids
        cache.truncate(workload.depth)
        if cache.pos < workload.depth:
            prefill(model.forward, cache, ids[cache.pos : workload.depth])
        prompt_end = workload.depth + workload.n_prompt
        started = perf_counter()
        if workload.n_prompt:
            prefill(model.forward, cache, ids[workload.depth : prompt_end])
        first = perf_counter() - started
        for i in range(prompt_end, len(ids)):
            model.forward(ids[i : i + 1], cache)
        return first, perf_counter() - started


def profile(model: Model, n_gen: int, depth: int = 0, kv: str = "f16") -> dict[str, float]:
    """Seconds of each part of a decode step after ``depth`` tokens: the mean of ``n_gen`` steps.

    Raises ContextError where these do not fit the model's context.
    """
    cache = model.new_cache(depth + n_gen + 1, kv)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, depth + n_gen + 1)
    prefill(model.forward, cache, ids[: depth + 1].astype(np.int32))
    times = _core.StepTimes()
    for i in range(depth + 1, depth + n_gen + 1):
        model.forward_batch([ids[i : i + 1]], [cache], times=times)
    return {part: seconds / n_gen for part, seconds in times.seconds.items() if seconds > 0}
