"""Which types of a peer take part: the fastest in a quick test of all of them.

All copies of all types at once would not fit into memory, so each is loaded alone, with few copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from alternate import TABLE_TOKENS
from contestants import Peer, Variant, any_bits, same_bits
from worker_process import WorkerDied

QUICK_ROWS = 2048
QUICK_WINDOWS = 2


@dataclass(frozen=True)
class Quick:
    """A rough time of one type."""

    peer: str
    kernel: str
    variant: Variant
    same_bits: bool
    threads: int
    n: int
    weights_s: float  # multiply-adds a second
    nmse: float  # of its product against NumPy


def quick_test(
    peer: Peer, encoding: str, *, m: int, k: int, nbytes: int, threads: list[int], tokens: list[int]
) -> list[Quick]:
    """Of all types of the peer that stand beside ``encoding``, on a matrix of at most m rows."""
    m = min(m, QUICK_ROWS) if nbytes else m
    variants = dict.fromkeys(same_bits(encoding), True)
    if any(n > TABLE_TOKENS for n in tokens):
        for variant in any_bits():
            variants.setdefault(variant, False)
    found: list[Quick] = []
    for variant, same in variants.items():
        kernel = peer.load(variant, m=m, k=k, nbytes=nbytes, check_n=tokens)
        if kernel is None:
            continue
        try:
            for count in threads:
                for n in (n for n in tokens if same or n > TABLE_TOKENS):
                    calls = 1 if n > TABLE_TOKENS else 8
                    seconds = min(
                        kernel.window(n=n, threads=count, calls=calls) for _ in range(QUICK_WINDOWS)
                    )
                    speed = m * k * n / seconds
                    found.append(
                        Quick(peer.name, kernel.kernel, variant, same, count, n, speed, kernel.nmse)
                    )
        except WorkerDied:
            peer.notes.append(f"{peer.name}: {kernel.kernel} {m}x{k} crashed")
        peer.unload()
    return found


def qualified(tests: list[Quick], *, threads: int, n: int) -> dict[Variant, bool]:
    """One peer's best for a case: of the same bits and, with many tokens, of any bits."""
    here = [test for test in tests if (test.threads, test.n) == (threads, n)]
    best: dict[Variant, bool] = {}
    for group in ([test for test in here if test.same_bits], here):
        if group:
            winner = max(group, key=lambda test: test.weights_s)
            best[winner.variant] = winner.same_bits
    return best
