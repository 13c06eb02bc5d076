"""Products of low-bit matrices: time, part of the machine's roofs, and speed beside llama.cpp's.

    python bench/kernels.py --shapes llama-2-7b --bits 2,4 --isa all \\
        --peer llama.cpp=PYTHON --json kernels.json --roofline kernels.png

"memory" goes round copies of a matrix that together are several times the last-level cache;
"cache" repeats a small one. A product is what a model pays for: building tables and multiplying.
Peers are ggml's kernels in llama-cpp-python and ik-llama-cpp-python, see bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from alternate import TABLE_TOKENS, Roofs, Settings, alternate
from contestants import OURS, Contestant, Kernel, Peer, PeerError, Tables
from kernel_report import report
from kernel_rows import Case, Row, Source, row_as_json, rows_of, total_as_json, totals
from measure import (
    OtherLoad,
    cache_bytes,
    default_thread_counts,
    last_level_cache_bytes,
    machine_facts,
    memory_buffer_bytes,
    positive,
    positive_list,
)
from model_shapes import Matrix, ShapeError, model_names, parse
from packed_copies import ENCODINGS, Copies, code_bits, packed_matrix
from qualify import Quick, qualified, quick_test
from roofline import MatplotlibMissing, draw, need_matplotlib
from table_build import TableBuild, table_build
from tqdm import tqdm

from tmac_py import _core

SOURCES: tuple[Source, ...] = ("cache", "memory")
TABLES: tuple[Tables, ...] = ("int8", "exact", "exact8")
CACHE_COLUMNS = 1024
CACHE_SHARE = 0.5  # of the L2 cache for the codes: tables and results need some too
L2_BYTES = 512 << 10  # where the system does not tell


@dataclass
class Results:
    """All that was measured."""

    rows: list[Row]
    quick: list[Quick]
    builds: list[TableBuild]
    roofs: Roofs


class Benchmark:
    """One run."""

    def __init__(self, args: argparse.Namespace, peers: list[Peer]) -> None:
        self._args, self._peers = args, peers
        self._pools = {threads: _core.ThreadPool(threads) for threads in args.threads}
        self._bytes = memory_buffer_bytes()
        self._settings = Settings(args.rounds, args.window_ms / 1e3)
        self.results = Results([], [], [], Roofs(self._pools, buffer_bytes=self._bytes))
        self._quick: dict[tuple[Any, ...], list[Quick]] = {}

    def run(self) -> None:
        """Measure everything into ``results``."""
        cases = list(self._cases())
        with tqdm(total=len(cases), desc="cases", disable=None, file=sys.stderr) as bar:
            for encoding, source, matrix in dict.fromkeys(
                (case.encoding, case.source, case.matrix) for case in cases
            ):
                here = [
                    case
                    for case in cases
                    if (case.encoding, case.source, case.matrix) == (encoding, source, matrix)
                ]
                for rows in self._matrix(here):
                    self.results.rows += rows
                    bar.update()
        if 1 in self._args.tokens and "memory" in self._args.sources:
            self.results.builds = table_build(
                "2" if "2" in self._args.bits else self._args.bits[0],
                group_size=self._args.group_size,
                isas=self._args.isa,
                tables=self._args.tables,
                pools=self._pools,
                nbytes=self._bytes,
                huge_pages=self._args.huge_pages,
                settings=self._settings,
            )

    def _cases(self) -> Iterator[Case]:
        """In the order of the report; those of one matrix stand together."""
        args = self._args
        for encoding, source in product(args.bits, args.sources):
            matrices = args.shapes.matrices if source == "memory" else [_cache_matrix(encoding)]
            tokens = [n for n in args.tokens if source == "memory" or n <= TABLE_TOKENS]
            for matrix, threads, n in product(matrices, self._pools, tokens):
                yield Case(matrix, encoding, n, threads, source)

    def _matrix(self, cases: list[Case]) -> Iterator[list[Row]]:
        """Rows of cases that have all but n and threads in common."""
        matrix, encoding, source = cases[0].matrix, cases[0].encoding, cases[0].source
        nbytes = self._bytes if source == "memory" else 0
        packed = packed_matrix(encoding, matrix.m, matrix.k, group_size=self._args.group_size)
        copies = Copies(packed, nbytes=nbytes, huge_pages=self._args.huge_pages)
        kernels = [
            Kernel(copies, self._pools, isa=isa, tables=tables)
            for isa, tables in product(self._args.isa, self._args.tables)
        ]
        loaded = [self._load(peer, cases, nbytes) for peer in self._peers]
        for case in cases:
            contestants: list[tuple[Contestant, bool]] = []
            for of_peer in loaded:
                contestants += of_peer[case]
            # From a cache there is no roof that was measured.
            roofs = self.results.roofs if source == "memory" else None
            entries = alternate(
                kernels,
                contestants,
                work=case.work,
                n=case.n,
                threads=case.threads,
                roofs=roofs,
                settings=self._settings,
            )
            yield rows_of(case, entries)
        for peer in self._peers:
            peer.unload()

    def _load(
        self, peer: Peer, cases: list[Case], nbytes: int
    ) -> dict[Case, list[tuple[Contestant, bool]]]:
        """The peer's best kernels of each case."""
        tokens = sorted({case.n for case in cases})
        matrix, encoding, source = cases[0].matrix, cases[0].encoding, cases[0].source
        key = (peer.name, encoding, source, matrix.k)
        if key not in self._quick:
            self._quick[key] = quick_test(
                peer,
                encoding,
                m=matrix.m,
                k=matrix.k,
                nbytes=nbytes and (last_level_cache_bytes() or nbytes),
                threads=self._args.threads,
                tokens=tokens,
            )
            self.results.quick += self._quick[key]
        best = {case: qualified(self._quick[key], threads=case.threads, n=case.n) for case in cases}
        kernels = {
            variant: peer.load(variant, m=matrix.m, k=matrix.k, nbytes=nbytes, check_n=[1])
            for variant in dict.fromkeys(variant for found in best.values() for variant in found)
        }
        return {
            case: [
                (kernel, same)
                for variant, same in best[case].items()
                if (kernel := kernels[variant]) is not None
            ]
            for case in cases
        }


def _cache_matrix(encoding: str) -> Matrix:
    """A matrix whose codes fill half of the L2 cache: a power of two of rows."""
    codes = (cache_bytes(2) or L2_BYTES) * CACHE_SHARE * 8 / code_bits(encoding)
    rows = int(codes / CACHE_COLUMNS)
    return Matrix("cache", 1 << max(5, rows.bit_length() - 1), CACHE_COLUMNS)


def as_json(facts: dict[str, Any], results: Results) -> dict[str, Any]:
    """The report with all samples."""
    return {
        "machine": facts,
        "roofs": results.roofs.as_json(),
        "rows": [row_as_json(row) for row in results.rows],
        "totals": [total_as_json(total) for total in totals(results.rows)],
        "quick_tests": [asdict(test) for test in results.quick],
        "table_build": [asdict(build) for build in results.builds],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.roofline and "memory" not in args.sources:
        parser.error("--roofline shows weights from memory: add memory to --from")
    facts, before, load = machine_facts(), _core.active_isa(), OtherLoad()
    peers: list[Peer] = []
    try:
        if args.roofline:
            need_matplotlib()
        peers += [Peer(name, python) for name, python in args.peer]
        benchmark = Benchmark(args, peers)
        benchmark.run()
    except (MatplotlibMissing, PeerError) as error:
        parser.exit(2, f"error: {error}\n")
    finally:
        _core.use_isa(before)
        for peer in peers:
            peer.close()
    facts["peers"] = {peer.name: peer.facts for peer in peers}
    facts["notes"] = [note for peer in peers for note in dict.fromkeys(peer.notes)]
    if args.huge_pages:
        facts["notes"].append("our weights are in pages of 2 MB, as far as the system grants them")
    facts["other_load_cpus"] = load.cpus()
    results = benchmark.results
    sums = totals(results.rows)
    print(report(facts, results.rows, sums, results.builds, results.roofs))
    if args.json:
        args.json.write_text(json.dumps(as_json(facts, results), indent=2) + "\n")
    if args.roofline:
        draw(args.roofline, sums, results.roofs, title=f"{args.shapes.text} on {facts['cpu']}")
    return 0


@dataclass(frozen=True)
class Shapes:
    """The argument, and the matrices it stands for."""

    text: str
    matrices: list[Matrix]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--shapes",
        type=_shapes,
        default="4096x4096",
        metavar="SHAPES",
        help=f"MxK, a file, or one of {', '.join(model_names())}; or several, with commas "
        "(default %(default)s)",
    )
    add("--bits", type=_bits, default="1,2,3,4,8", help="(default %(default)s)")
    add("--group-size", type=positive, default=128, help="weights per scale (default 128)")
    add("--tables", type=_tables, default="int8", help=f"of {', '.join(TABLES)} (default int8)")
    add("-t", "--threads", type=positive_list, default=default_thread_counts(), metavar="1,2")
    add(
        "-n",
        "--tokens",
        type=positive_list,
        default="1,4,512",
        metavar="1,4,512",
        help="vectors that are multiplied at once (default %(default)s)",
    )
    add("--isa", type=_isas, default=_core.active_isa(), help="names or all (default: the best)")
    add(
        "--from",
        dest="sources",
        type=_sources,
        default="cache,memory",
        help="where the weights are (default %(default)s)",
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        add("--huge-pages", action="store_true", help="for our weights (default: ordinary pages)")
    else:
        parser.set_defaults(huge_pages=False)
    add(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="compare with the ggml that this interpreter's environment has; may be repeated",
    )
    add("--rounds", type=positive, default=5, help="in which each has its turns (default 5)")
    add("--window-ms", type=positive, default=20, help="length of a turn (default 20)")
    add("--json", type=Path, metavar="FILE", help="write the report with all samples here as well")
    add("--roofline", type=Path, metavar="FILE.png", help="draw a picture (needs matplotlib)")
    return parser


def _shapes(text: str) -> Shapes:
    try:
        return Shapes(text, parse(text))
    except ShapeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bits(text: str) -> list[str]:
    return _known(text, ENCODINGS)


def _tables(text: str) -> list[Tables]:
    return [name for name in TABLES if name in _known(text, TABLES)]


def _sources(text: str) -> list[Source]:
    return [name for name in SOURCES if name in _known(text, SOURCES)]


def _isas(text: str) -> list[str]:
    usable = [isa["name"] for isa in _core.isas() if isa["usable"]]
    return usable if text == "all" else _known(text, usable)


def _known(text: str, names: Sequence[str]) -> list[str]:
    parts = list(dict.fromkeys(text.split(",")))
    if wrong := [part for part in parts if part not in names]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(names)}")
    return parts


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if not name or not python or name == OURS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON")
    return name, python


if __name__ == "__main__":
    sys.exit(main())
