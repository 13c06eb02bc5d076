"""What takes turns: the kernels of this package, and those of ggml in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from packed_copies import Copies
from peer_types import PREFILL_TYPES, TYPES_OF_ENCODING
from worker_process import WorkerDied, WorkerProcess

from tmac_py import _core
from tmac_py.machine import memory_bytes

Tables = Literal["int8", "exact", "exact8"]

OURS = "tmac_py"
MEMORY_LEFT = 1 << 30  # bytes that stay free when a peer has loaded its copies


class Contestant(Protocol):
    """One kernel on one matrix."""

    @property
    def party(self) -> str:
        """``OURS`` or the peer's name; each has a process of its own."""

    @property
    def kernel(self) -> str:
        """Instruction set and tables, or type and layout."""

    @property
    def nbytes(self) -> int:
        """Of the stored matrix."""

    def window(self, *, n: int, threads: int, calls: int) -> float:
        """Seconds of a product with n vectors, over ``calls`` products after one to warm up."""


class Kernel:
    """One instruction set of this package with one kind of tables."""

    party = OURS

    def __init__(
        self, copies: Copies, pools: dict[int, _core.ThreadPool], *, isa: str, tables: Tables
    ) -> None:
        self.kernel = f"{isa} {tables}"
        self.nbytes = copies.nbytes
        self._copies, self._pools = copies, pools
        self._isa: str = isa
        self._tables: Tables = tables

    def window(self, *, n: int, threads: int, calls: int) -> float:
        linear, pool, tables = self._copies.pick(), self._pools[threads], self._tables
        x = np.random.default_rng(1).standard_normal((n, linear.k), dtype=np.float32)
        _core.use_isa(self._isa)
        _core.linear_forward(linear, x, pool, tables=tables)
        linears = [self._copies.pick() for _ in range(calls)]
        start = time.perf_counter()
        for linear in linears:
            _core.linear_forward(linear, x, pool, tables=tables)
        return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Variant:
    """A type of a peer, in its plain layout or in the one that the library makes when loading."""

    type_name: str
    repacked: bool


class PeerKernel:
    """Copies of a matrix that a peer has loaded."""

    def __init__(
        self,
        party: str,
        variant: Variant,
        loaded: dict[str, Any],
        ask: Callable[..., dict[str, Any]],
    ) -> None:
        self.party = party
        self.variant = variant
        self.kernel = _kernel_name(variant.type_name, loaded["layout"])
        self.nbytes: int = loaded["nbytes"]
        self.nmse: float = loaded["nmse"]
        self._key, self._ask = loaded["key"], ask

    def window(self, *, n: int, threads: int, calls: int) -> float:
        answer = self._ask("time", key=self._key, n=n, threads=threads, calls=calls)
        seconds: float = answer["seconds"]
        return seconds


class PeerError(RuntimeError):
    """A peer does not start."""


class Peer:
    """A library in a process of its own; what it could not do is in ``notes``."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self.notes: list[str] = []
        self._python = python
        self._process = self._start()
        self.facts = self._process.facts
        self._missing: set[tuple[Variant, int]] = set()  # with the k that does not work

    def load(
        self, variant: Variant, *, m: int, k: int, nbytes: int, check_n: list[int]
    ) -> PeerKernel | None:
        """Copies of a matrix with at least ``nbytes``; None where it cannot be, with a note."""
        if (variant, k) in self._missing:
            return None
        _, available = memory_bytes()
        if available is not None and available < nbytes + m * k + MEMORY_LEFT:
            self._note(f"{_variant_name(variant)} {m}x{k}: not enough memory")
            return None
        try:
            loaded = self._process.ask(
                "load",
                type_name=variant.type_name,
                repacked=variant.repacked,
                m=m,
                k=k,
                nbytes=nbytes,
                check_n=check_n,
            )
        except WorkerDied as error:
            self._restart()
            self._missing.add((variant, k))
            self._note(f"{_variant_name(variant)} {m}x{k}: {error}")
            return None
        if "missing" in loaded:
            self._missing.add((variant, k))
            if not loaded["expected"]:
                self._note(f"{_variant_name(variant)} {m}x{k}: {loaded['missing']}")
            return None
        return PeerKernel(self.name, variant, loaded, self._process.ask)

    def unload(self) -> None:
        """Free what is loaded; a process that has died is started again."""
        try:
            self._process.ask("unload")
        except WorkerDied as error:
            self._note(str(error))
            self._restart()

    def close(self) -> None:
        self._process.close()

    def _restart(self) -> None:
        self._process.close()
        self._process = self._start()

    def _start(self) -> WorkerProcess:
        try:
            return WorkerProcess("peer_worker.py", python=self._python)
        except (WorkerDied, OSError) as error:
            raise PeerError(f"{self.name}: {error}") from None

    def _note(self, text: str) -> None:
        self.notes.append(f"{self.name}: {text}")


def same_bits(encoding: str) -> list[Variant]:
    """Of the peers' types that stand beside an encoding."""
    return _variants(TYPES_OF_ENCODING.get(encoding, ()))


def any_bits() -> list[Variant]:
    """Of the types that are fastest with many tokens."""
    return _variants(PREFILL_TYPES)


def _variants(types: tuple[str, ...]) -> list[Variant]:
    return [Variant(name, repacked) for name in types for repacked in (False, True)]


def _variant_name(variant: Variant) -> str:
    return variant.type_name + (" repacked" if variant.repacked else "")


def _kernel_name(type_name: str, layout: str) -> str:
    if layout == "plain":
        return type_name
    return layout if layout.startswith(type_name) else f"{type_name} {layout}"
