"""One matrix times one vector: time and bandwidth by shape, bits, tables, threads and ISA.

    python bench/kernels.py --bits 2,4 --isa all

"cache": one matrix again and again. "memory": copies in turn that together are much larger than
the last-level cache, so that each call reads its weights from memory. A call is what a model pays
for a matrix of its own: building the tables and multiplying. The instruction sets take turns.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from measure import (
    OtherLoad,
    Spread,
    default_thread_counts,
    describe,
    describe_load,
    machine_facts,
    memory_buffer_bytes,
    positive,
    positive_list,
)
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.cli.tables import format_table

Source = Literal["cache", "memory"]
Tables = Literal["int8", "exact"]
Shape = tuple[int, int]

SOURCES: tuple[Source, ...] = ("cache", "memory")
CALLS_A_TURN = 5  # of one instruction set before the next


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    m: int
    k: int
    bits: int
    nbytes: int  # of the packed matrix
    tables: Tables
    threads: int
    isa: str
    source: Source
    seconds: Spread  # of one call
    read_gb_s: float  # read bandwidth from memory with as many threads

    @property
    def gb_s(self) -> float:
        """Packed weights over the median time."""
        return self.nbytes / self.seconds.median / 1e9

    @property
    def share(self) -> float | None:
        """Part of the read bandwidth that is used; None if the weights come from a cache."""
        return self.gb_s / self.read_gb_s if self.source == "memory" else None


class Copies:
    """One packed matrix several times in one buffer."""

    def __init__(
        self, shape: Shape, *, bits: int, group_size: int, buffer: NDArray[np.uint8]
    ) -> None:
        m, k = shape
        packed = _core.pack(
            np.random.default_rng(0).integers(1 << bits, size=shape, dtype=np.uint8),
            np.full((m, -(-k // group_size)), 0.01, dtype=np.float16),
            bits=bits,
            group_size=group_size,
            offset_kind="none",
        )
        self.nbytes = packed.nbytes
        count = buffer.nbytes // packed.nbytes
        if count < 2:
            raise ValueError(
                f"{m}x{k} with {bits} bits is too large for the memory of this machine"
            )
        copies = buffer[: count * packed.nbytes].reshape(count, packed.nbytes)
        copies[:] = packed
        self._linears = [
            _core.Linear(
                copy,
                m=m,
                k=k,
                bits=bits,
                group_size=group_size,
                offset_kind="none",
                zero=2.0 ** (bits - 1),
            )
            for copy in copies
        ]
        self._turn = 0

    def pick(self, source: Source) -> _core.Linear:
        """Always the same copy from "cache", the one used longest ago from "memory"."""
        if source == "cache":
            return self._linears[0]
        self._turn = (self._turn + 1) % len(self._linears)
        return self._linears[self._turn]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows in the order of the report."""
    pools = {threads: _core.ThreadPool(threads) for threads in args.threads}
    size = memory_buffer_bytes()
    read_gb_s = {threads: _core.read_bandwidth(size, pool) for threads, pool in pools.items()}
    # Pages of ordinary size, aligned like the packed matrices of a mapped .lut file.
    buffer = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    for shape, bits in product(args.shapes, args.bits):
        group_size = min(args.group_size, shape[1])
        copies = Copies(shape, bits=bits, group_size=group_size, buffer=buffer)
        for tables, threads, source in product(args.tables, pools, SOURCES):
            seconds = _sample(args, copies, shape[1], pools[threads], tables, source)
            for isa in args.isa:
                yield Row(
                    m=shape[0],
                    k=shape[1],
                    bits=bits,
                    nbytes=copies.nbytes,
                    tables=tables,
                    threads=threads,
                    isa=isa,
                    source=source,
                    seconds=Spread.of(seconds[isa]),
                    read_gb_s=read_gb_s[threads],
                )


def _sample(
    args: argparse.Namespace,
    copies: Copies,
    k: int,
    pool: _core.ThreadPool,
    tables: Tables,
    source: Source,
) -> dict[str, list[float]]:
    """Seconds of each call, by instruction set."""
    x = np.random.default_rng(1).standard_normal((1, k), dtype=np.float32)
    seconds: dict[str, list[float]] = {isa: [] for isa in args.isa}
    for _ in range(-(-args.calls // CALLS_A_TURN)):
        for isa in args.isa:
            _core.use_isa(isa)
            _core.linear_forward(copies.pick(source), x, pool, tables=tables)  # wakes the threads
            for _ in range(CALLS_A_TURN):
                linear = copies.pick(source)
                start = time.perf_counter()
                _core.linear_forward(linear, x, pool, tables=tables)
                seconds[isa].append(time.perf_counter() - start)
    return seconds


def report(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The text that is printed."""
    roofs = dict(sorted({row.threads: row.read_gb_s for row in rows}.items()))
    read = ", ".join(f"{gb_s:.1f} GB/s (threads {threads})" for threads, gb_s in roofs.items())
    heading = [
        *describe(facts),
        ("memory", f"read at {read}"),
        ("others", describe_load(facts["other_load_cpus"])),
    ]
    table = [
        (
            "m x k",
            "bits",
            "tables",
            "threads",
            "isa",
            "from",
            "us (lowest-highest)",
            "GB/s",
            "of read",
        )
    ]
    for row in rows:
        microseconds = Spread(*(value * 1e6 for value in asdict(row.seconds).values()))
        table.append(
            (
                f"{row.m}x{row.k}",
                str(row.bits),
                row.tables,
                str(row.threads),
                row.isa,
                row.source,
                str(microseconds),
                f"{row.gb_s:.1f}",
                "" if row.share is None else f"{row.share:.0%}",
            )
        )
    return "\n\n".join(
        (format_table(heading, indent=""), format_table(table, right="lrlrllrrr", indent=""))
    )


def as_json(facts: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The report as one object; times in seconds."""
    return {
        "machine": facts,
        "rows": [{**asdict(row), "gb_s": row.gb_s, "share_of_read": row.share} for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--shapes",
        type=_shapes,
        default="4096x4096",
        metavar="MxK,...",
        help="(default %(default)s)",
    )
    add("--bits", type=_bits, default="1,2,3,4,8", help="(default %(default)s)")
    add("--group-size", type=positive, default=128, help="weights per scale (default 128)")
    add("--tables", type=_tables, default="int8", help="int8, exact or both (default int8)")
    add("-t", "--threads", type=positive_list, default=default_thread_counts(), metavar="1,2")
    add("--isa", type=_isas, default=_core.active_isa(), help="names or all (default: the best)")
    add("--calls", type=positive, default=100, help="calls a row is the median of (default 100)")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    facts, before, load = machine_facts(), _core.active_isa(), OtherLoad()
    try:
        rows = list(measure(args))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    finally:
        _core.use_isa(before)
    facts["other_load_cpus"] = load.cpus()
    print(json.dumps(as_json(facts, rows), indent=2) if args.json else report(facts, rows))
    return 0


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        m, _, k = part.partition("x")
        shapes.append((positive(m), positive(k)))
    return shapes


def _bits(text: str) -> list[int]:
    values = positive_list(text)
    if max(values) > 8:
        raise argparse.ArgumentTypeError(f"bits are 1 to 8, not {max(values)}")
    return values


def _tables(text: str) -> list[Tables]:
    tables: list[Tables] = []
    for part in text.split(","):
        if part not in ("int8", "exact"):
            raise argparse.ArgumentTypeError(f"{part!r} is not int8 or exact")
        tables.append("int8" if part == "int8" else "exact")
    return tables


def _isas(text: str) -> list[str]:
    usable = [isa["name"] for isa in _core.isas() if isa["usable"]]
    names = usable if text == "all" else text.split(",")
    if wrong := [name for name in names if name not in usable]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(usable)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
