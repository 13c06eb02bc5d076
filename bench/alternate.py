"""Contestants in turns, in short windows, with the roofs measured in between.

A round gives each peer a window, and each of our kernels one right beside each of them, so that a
drift of the machine meets both; a ratio is the median over these pairs. The order turns round from
one round to the next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from contestants import OURS, Contestant
from measure import Spread
from worker_process import WorkerDied

from tmac_py import _core

TABLE_TOKENS = 16
"""With more vectors the roof is the multiply peak."""

IDLE_SECONDS = 0.03  # between processes: the threads of the one before have gone to sleep
MOST_CALLS = 1000  # in a window
OWN_BLOCKS = 4  # of a round without peers


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int
    window_seconds: float


@dataclass(frozen=True)
class Roof:
    """One measurement: bytes or int8 multiply-adds a second."""

    at_seconds: float  # since the start of the run
    value: float


class Roofs:
    """Read bandwidth and multiply peak by number of threads, with all that was measured."""

    def __init__(self, pools: dict[int, _core.ThreadPool], *, buffer_bytes: int) -> None:
        self.bandwidth: dict[int, list[Roof]] = {threads: [] for threads in pools}
        self.multiply: dict[int, list[Roof]] = {threads: [] for threads in pools}
        self._pools, self._bytes = pools, buffer_bytes
        self._isa = _core.active_isa()
        self._start = time.perf_counter()

    def measure(self, threads: int, *, many_tokens: bool) -> float:
        """The roof of products with few or with many tokens, now."""
        _core.use_isa(self._isa)
        pool = self._pools[threads]
        if many_tokens:
            value = _core.multiply_peak(pool)
            log = self.multiply[threads]
        else:
            value = _core.read_bandwidth(self._bytes, pool) * 1e9
            log = self.bandwidth[threads]
        log.append(Roof(time.perf_counter() - self._start, value))
        return value

    def as_json(self) -> dict[str, dict[int, list[dict[str, float]]]]:
        """What was measured, by roof and number of threads."""
        logs = {"read_bytes_s": self.bandwidth, "multiply_adds_s": self.multiply}
        return {
            name: {threads: [asdict(roof) for roof in log] for threads, log in by_threads.items()}
            for name, by_threads in logs.items()
        }


@dataclass
class Entry:
    """All windows of one contestant."""

    contestant: Contestant
    calls: int
    same_bits: bool  # as the others; a peer's type of other bits competes only with many tokens
    seconds: list[float] = field(default_factory=list)  # of a product, one for each window
    shares: list[float] = field(default_factory=list)  # of the roof around the window
    beside: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Our kernels: a peer's seconds over ours of the pairs, by party and kernel."""

    @property
    def key(self) -> tuple[str, str]:
        return self.contestant.party, self.contestant.kernel

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)


def alternate(
    ours: Sequence[Contestant],
    peers: Sequence[tuple[Contestant, bool]],
    *,
    work: int,
    n: int,
    threads: int,
    roofs: Roofs | None,
    settings: Settings,
) -> list[Entry]:
    """Entries of our kernels, then of the peers (given with whether they are of the same bits).

    ``work`` is what the roof counts in a product with n vectors: multiply-adds with many tokens;
    with few each contestant's own bytes count. Without ``roofs`` there are no shares. A peer that
    crashes is left out.
    """
    many = n > TABLE_TOKENS
    clock = _Clock(n, threads)
    own = [Entry(kernel, clock.calls(kernel, settings), True) for kernel in ours]
    others = []
    for kernel, same_bits in peers:
        try:
            others.append(Entry(kernel, clock.calls(kernel, settings), same_bits))
        except WorkerDied:
            continue
    roof = roofs.measure(threads, many_tokens=many) if roofs else 0.0
    for number in range(settings.rounds):
        marks = {id(entry): len(entry.seconds) for entry in (*own, *others)}
        blocks: list[Entry | None] = list(others) or [None] * OWN_BLOCKS
        for peer in blocks[:: -1 if number % 2 else 1]:
            if not _block(clock, own, peer, turned=number % 2 == 1):
                others.remove(peer)  # type: ignore[arg-type]
        if roofs:
            after = roofs.measure(threads, many_tokens=many)
            for entry in (*own, *others):
                amount = work if many else entry.contestant.nbytes
                fresh = entry.seconds[marks[id(entry)] :]
                entry.shares += [amount / seconds / ((roof + after) / 2) for seconds in fresh]
            roof = after
    if not all(entry.seconds for entry in own):  # the only peer crashed in the only round
        _block(clock, own, None, turned=False)
    return own + others


class _Clock:
    """Runs windows, and lets the process that had the turn before go to sleep first."""

    def __init__(self, n: int, threads: int) -> None:
        self._n, self._threads = n, threads
        self._party = OURS

    def window(self, contestant: Contestant, calls: int) -> float:
        if contestant.party != self._party:
            time.sleep(IDLE_SECONDS)
        self._party = contestant.party
        return contestant.window(n=self._n, threads=self._threads, calls=calls)

    def calls(self, contestant: Contestant, settings: Settings) -> int:
        """Products that fill a window."""
        seconds = self.window(contestant, 1)
        return max(1, min(MOST_CALLS, round(settings.window_seconds / seconds)))


def _block(clock: _Clock, own: list[Entry], peer: Entry | None, *, turned: bool) -> bool:
    """One window of the peer and of each of our kernels; False if the peer crashed."""
    entries = [*own] if peer is None else [peer, *own]
    seconds: dict[int, float] = {}
    for entry in entries[:: -1 if turned else 1]:
        try:
            seconds[id(entry)] = clock.window(entry.contestant, entry.calls)
        except WorkerDied:
            return False
    for entry in entries:
        entry.seconds.append(seconds[id(entry)])
        if peer is not None and entry is not peer:
            ratio = seconds[id(peer)] / seconds[id(entry)]
            entry.beside.setdefault(peer.key, []).append(ratio)
    return True
