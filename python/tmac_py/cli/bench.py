"""``tmac bench``: how fast a model runs, beside what the machine allows; as llama-bench does it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tmac_py.cli.models import DEFAULT_MODEL, MODEL_HELP, resolve_model
from tmac_py.errors import OptionError
from tmac_py.spec import Tables

if TYPE_CHECKING:
    from tmac_py.benchmark import Measurement, Workload

_FORMATS = ("md", "json", "jsonl", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac bench``."""
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help=f"{MODEL_HELP}; may be given several times",
    )
    parser.add_argument(
        "--synthetic",
        action="append",
        default=[],
        metavar="SHAPE:WEIGHTS",
        help="a known shape with random weights, as llama-2-7b:2bit, or llama-2-7b/8:4bit with 8 "
        "layers; may be given several times",
    )
    for flags, default, text in (
        (("-p", "--n-prompt"), "512", "prompt tokens (0 = no such row)"),
        (("-n", "--n-gen"), "128", "tokens to generate (0 = no such row)"),
        (("-d", "--n-depth"), "0", "tokens in the KV cache before the clock starts"),
    ):
        parser.add_argument(
            *flags,
            type=_numbers(0),
            default=_numbers(0)(default),
            metavar="N,...",
            help=f"{text}; several with commas, ranges as 1-8 or 1-8+2 (default: {default})",
        )
    parser.add_argument(
        "-pg",
        action="append",
        default=[],
        type=_pair,
        metavar="P,G",
        help="a row of a prompt and an answer together; may be given several times",
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=_numbers(1),
        metavar="N,...",
        help="threads to compute with (default: the performance cores that this process may use)",
    )
    parser.add_argument(
        "-r",
        "--repetitions",
        type=_numbers(1),
        default=[5],
        metavar="N",
        help="of each row, after one that is not counted (default: 5)",
    )
    parser.add_argument(
        "--isa",
        metavar="NAME,...",
        help="instruction sets (tmac info lists them; default: the best)",
    )
    parser.add_argument("--tables", choices=get_args(Tables), help="lookup tables, as for tmac run")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print what the parts of a decode step take, in place of the rows",
    )
    parser.add_argument(
        "-o", "--output", choices=_FORMATS, default="md", help="how to print (default: md)"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where fetched models are kept, as for tmac run"
    )
    parser.add_argument("--offline", action="store_true", help="never fetch a model")


def execute(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    from tmac_py.machine import default_threads

    workloads = _workloads(args)
    threads = args.threads or [default_threads()]
    isas = args.isa.split(",") if args.isa else [None]
    with tempfile.TemporaryDirectory(prefix="tmac-bench-") as folder:
        if args.profile:
            for name, path in _models(args, Path(folder)):
                _print_profile(name, path, workloads, threads, args)
            return 0
        writer = _WRITERS[args.output]()
        for name, path in _models(args, Path(folder)):
            for isa in isas:
                for row in _rows(name, path, workloads, threads, isa, args):
                    writer.add(row)
        writer.end()
    return 0


def _rows(
    name: str,
    path: Path,
    workloads: list[Workload],
    threads: list[int],
    isa: str | None,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    from tmac_py.benchmark import measure, weight_count
    from tmac_py.lutfile import LutFile

    with LutFile.open(path, check=False) as file:
        facts = {
            **_machine(),
            "model_filename": name,
            "model_type": _type_of(file),
            "model_size": file.nbytes,
            "model_n_params": weight_count(file),
        }
    for measured in measure(
        path,
        workloads,
        threads=threads,
        repetitions=args.repetitions[0],
        tables=args.tables,
        isa=isa,
    ):
        yield {**facts, **_numbers_of(measured)}


def _print_profile(
    name: str, path: Path, workloads: list[Workload], threads: list[int], args: argparse.Namespace
) -> None:
    from tmac_py.benchmark import profile
    from tmac_py.cli.tables import format_table
    from tmac_py.model import Model

    for number in threads:
        with Model.load(path, threads=number, tables=args.tables, check=False) as model:
            for workload in workloads:
                if workload.n_prompt:
                    continue
                seconds = profile(model, workload.n_gen, workload.depth)
                whole = sum(seconds.values())
                print(f"{name}, {workload.name}, {number} threads: {whole * 1e3:.2f} ms a token\n")
                rows = [
                    (part, f"{own * 1e6:.0f}", f"{own / whole:.1%}")
                    for part, own in seconds.items()
                ]
                print(format_table([("part", "us", "share"), *rows], right="lrr"), flush=True)


def _machine() -> dict[str, Any]:
    from tmac_py import _core
    from tmac_py.machine import cpu_name

    return {
        "build_commit": _core.__version__,
        "build_compiler": _core.compiler,
        "cpu_info": cpu_name(),
    }


def _type_of(file: Any) -> str:
    """Architecture and how most weights are stored: "llama 4 bits g32"."""
    sizes: dict[str, int] = {}
    for entry in file.tensors.values():
        if (spec := entry.spec) is not None:
            kind = spec.encoding if spec.encoding == "ternary" else f"{spec.bits} bits"
            group = "" if spec.group_size == spec.k else f" g{spec.group_size}"
            sizes[kind + group] = sizes.get(kind + group, 0) + spec.m * spec.k
    return f"{file.config.architecture} {max(sizes, key=lambda kind: sizes[kind])}"


def _numbers_of(measured: Measurement) -> dict[str, Any]:
    """One row, under llama-bench's names and some more."""
    from tmac_py.benchmark import peak_memory_bytes

    nanoseconds = [round(seconds * 1e9) for seconds in measured.samples]
    rates = measured.rates
    several = len(rates) > 1
    return {
        "n_threads": measured.threads,
        "isa": measured.isa,
        "tables": measured.tables,
        "n_prompt": measured.workload.n_prompt,
        "n_gen": measured.workload.n_gen,
        "n_depth": measured.workload.depth,
        "test": measured.workload.name,
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if several else 0,
        "avg_ts": statistics.mean(rates),
        "stddev_ts": statistics.stdev(rates) if several else 0.0,
        "median_ts": measured.rate,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
        "weight_bytes": measured.weight_bytes,
        "weight_bytes_per_second": measured.weight_rate,
        "read_bytes_per_second": measured.bandwidth,
        "multiply_adds_per_second": measured.peak,
        "limit_share": measured.limit_share,
        "peak_rss_bytes": peak_memory_bytes(),
    }


def _models(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files, synthetic ones written when their turn comes and removed after it."""
    from tmac_py.synthetic import parse_synthetic, write_synthetic

    for text in args.synthetic:
        parse_synthetic(text)
    names = args.model or ([] if args.synthetic else [DEFAULT_MODEL])
    paths = [
        resolve_model(name, cache_dir=args.cache_dir, offline=args.offline, quiet=False)
        for name in names
    ]
    for name, path in zip(names, paths, strict=True):
        yield name, Path(path)
    for text in args.synthetic:
        path = folder / "synthetic.lut"
        write_synthetic(path, text)
        yield text, path
        path.unlink()


def _workloads(args: argparse.Namespace) -> list[Workload]:
    from tmac_py.benchmark import Workload

    found = []
    for depth in args.n_depth:
        found += [Workload(n, 0, depth) for n in args.n_prompt if n]
        found += [Workload(0, n, depth) for n in args.n_gen if n]
        found += [Workload(prompt, answer, depth) for prompt, answer in args.pg]
    if not found:
        raise OptionError("nothing to measure: -p and -n are 0; allowed: one above 0, or -pg")
    return found


class _Markdown:
    """A table that grows row by row, with the limit beside what was reached."""

    _COLUMNS = ("model", "size", "params", "isa", "threads", "test", "t/s", "GB/s", "limit")
    _WIDTHS = (26, 10, 9, 11, 7, 15, 18, 7, 24)

    def __init__(self) -> None:
        self._begun = False

    def add(self, row: dict[str, Any]) -> None:
        if not self._begun:
            self._line(self._COLUMNS)
            self._line(["-" * (width - 1) + ":" for width in self._WIDTHS])
            self._begun = True
        rate = row["weight_bytes_per_second"]
        self._line(
            (
                row["model_type"],
                _size(row["model_size"]),
                _count(row["model_n_params"]),
                row["isa"],
                str(row["n_threads"]),
                row["test"],
                f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
                "" if rate is None else f"{rate / 1e9:.1f}",
                _limit(row),
            )
        )

    def end(self) -> None:
        pass

    def _line(self, cells: Any) -> None:
        padded = [str(cell).rjust(width) for cell, width in zip(cells, self._WIDTHS, strict=True)]
        print(f"| {' | '.join(padded)} |", flush=True)


def _limit(row: dict[str, Any]) -> str:
    share = row["limit_share"]
    if share is None:
        return ""
    if row["n_prompt"]:
        return f"{share:.0%} of {row['multiply_adds_per_second'] / 1e9:.0f} GMAC/s"
    return f"{share:.0%} of {row['read_bytes_per_second'] / 1e9:.1f} GB/s"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


class _Json:
    """One array at the end."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def end(self) -> None:
        print(json.dumps(self._rows, indent=2))


class _JsonLines:
    """One object a line, as soon as it is known."""

    def add(self, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)

    def end(self) -> None:
        pass


class _Csv:
    """One line a row, all numbers as text; lists are JSON."""

    def __init__(self) -> None:
        self._begun = False

    def add(self, row: dict[str, Any]) -> None:
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        if not self._begun:
            writer.writerow(row)
            self._begun = True
        writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in row.values())
        sys.stdout.flush()

    def end(self) -> None:
        pass


_WRITERS: dict[str, Callable[[], _Markdown | _Json | _JsonLines | _Csv]] = {
    "md": _Markdown,
    "json": _Json,
    "jsonl": _JsonLines,
    "csv": _Csv,
}


def _numbers(low: int) -> Callable[[str], list[int]]:
    """An argparse type: whole numbers and ranges as "1,2,4" and "1-8+2", each from ``low`` up."""
    import re

    def parse(text: str) -> list[int]:
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+)(?:\+(\d+))?)?", part)
            first = int(match[1]) if match else -1
            last = int(match[2] or match[1]) if match else -1
            step = int(match[3] or 1) if match else 0
            if first < low or last < first or step < 1:
                raise argparse.ArgumentTypeError(
                    f"{text!r} is not allowed; give whole numbers from {low} up, "
                    "as 1,2,4 or 1-8 or 1-8+2"
                )
            found += range(first, last + 1, step)
        return found

    return parse


def _pair(text: str) -> tuple[int, int]:
    """An argparse type: "512,128"."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give two numbers, as 512,128")
    if sum(map(int, parts)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; one must be above 0")
    return int(parts[0]), int(parts[1])
