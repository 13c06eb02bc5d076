"""Results of the kernel benchmark: a row for each contestant of a case, and sums over a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from alternate import TABLE_TOKENS, Entry
from contestants import OURS
from measure import Spread
from model_shapes import Matrix

Source = Literal["cache", "memory"]


@dataclass(frozen=True)
class Case:
    """What all contestants of a row of windows compute."""

    matrix: Matrix
    encoding: str  # of our kernels
    n: int
    threads: int
    source: Source

    @property
    def many_tokens(self) -> bool:
        return self.n > TABLE_TOKENS

    @property
    def work(self) -> int:
        """Multiply-adds of a product: weights times vectors."""
        return self.matrix.m * self.matrix.k * self.n


@dataclass(frozen=True)
class Ratio:
    """Our speed over a peer's."""

    party: str
    kernel: str
    value: Spread  # of the pairs of neighbouring windows


@dataclass(frozen=True)
class Row:
    """One contestant in one case."""

    case: Case
    party: str
    kernel: str
    same_bits: bool
    nbytes: int  # of the stored matrix
    calls: int  # of a window
    seconds: Spread  # of a product, over the windows
    samples: list[float]
    share: Spread | None  # of the roof: read bandwidth, or multiply peak with many tokens
    ratio: Ratio | None  # to the fastest peer of the same bits
    ratio_any: Ratio | None  # with many tokens: to the fastest peer of any bits

    @property
    def gb_s(self) -> float:
        """Stored weights over the median time."""
        return self.nbytes / self.seconds.median / 1e9

    @property
    def weights_s(self) -> float:
        """Multiply-adds a second."""
        return self.case.work / self.seconds.median


def rows_of(case: Case, entries: Sequence[Entry]) -> list[Row]:
    """Ours first, then the peers from the fastest on."""
    ours = [entry for entry in entries if entry.contestant.party == OURS]
    peers = sorted(
        (entry for entry in entries if entry.contestant.party != OURS),
        key=lambda entry: entry.spread.median,
    )
    equals = [peer for peer in peers if peer.same_bits]
    return [
        Row(
            case=case,
            party=entry.contestant.party,
            kernel=entry.contestant.kernel,
            same_bits=entry.same_bits,
            nbytes=entry.contestant.nbytes,
            calls=entry.calls,
            seconds=entry.spread,
            samples=entry.seconds,
            share=Spread.of(entry.shares) if entry.shares else None,
            ratio=_ratio(entry, equals),
            ratio_any=_ratio(entry, peers) if case.many_tokens else None,
        )
        for entry in (*ours, *peers)
    ]


def _ratio(entry: Entry, peers: Sequence[Entry]) -> Ratio | None:
    """To the first of ``peers``."""
    if not peers or not (pairs := entry.beside.get(peers[0].key)):
        return None
    return Ratio(*peers[0].key, Spread.of(pairs))


@dataclass(frozen=True)
class Total:
    """One kernel on all matrices of a model, each as often as the model has it, from memory.

    For the peers it is the fastest of the same bits, matrix by matrix.
    """

    encoding: str
    n: int
    threads: int
    party: str  # OURS or "best peer"
    kernel: str
    seconds: float
    work: int
    nbytes: int

    @property
    def weights_s(self) -> float:
        return self.work / self.seconds

    @property
    def intensity(self) -> float:
        """Multiply-adds for a byte of stored weights."""
        return self.work / self.nbytes


BEST_PEER = "best peer"


def totals(rows: Iterable[Row]) -> list[Total]:
    """In the order of the rows, the peers after ours."""
    groups: dict[tuple[str, int, int, str, str], list[Row]] = {}
    fastest: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        case = row.case
        if case.source != "memory" or not row.same_bits:
            continue
        here = (case.encoding, case.n, case.threads)
        if row.party == OURS:
            groups.setdefault((*here, OURS, row.kernel), []).append(row)
        else:
            best = fastest.setdefault(here, {})
            best[case.matrix.size] = min(
                best.get(case.matrix.size, row), row, key=lambda row: row.seconds.median
            )
    for here, best in fastest.items():
        names = sorted({f"{row.party} {row.kernel}" for row in best.values()})
        key = (*here, BEST_PEER, ", ".join(names))
        groups[key] = list(best.values())
    return [
        Total(
            *key,
            seconds=sum(row.case.matrix.count * row.seconds.median for row in group),
            work=sum(row.case.matrix.count * row.case.work for row in group),
            nbytes=sum(row.case.matrix.count * row.nbytes for row in group),
        )
        for key, group in groups.items()
    ]


def row_as_json(row: Row) -> dict[str, Any]:
    """Times in seconds, speeds in GB/s and multiply-adds/s."""
    return {**asdict(row), "gb_s": row.gb_s, "weights_s": row.weights_s}


def total_as_json(total: Total) -> dict[str, Any]:
    return {**asdict(total), "weights_s": total.weights_s, "intensity": total.intensity}
