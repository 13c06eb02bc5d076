"""``tmac bench --compare``: what changed between two results, and what is only noise."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmac_py.checks import is_finite
from tmac_py.cli.bench_rows import SCHEMA, Row
from tmac_py.cli.tables import format_table
from tmac_py.errors import ModelFileError, OptionError

EXIT_SLOWER = 1

_WORKLOAD = ("n_prompt", "n_gen", "n_depth")
_SETTING = ("isa", "n_threads", "tables", "kv")
_MODEL = ("model_type", "model_n_params")
_NUMBERS = ("median_ts", "stddev_ts", "avg_ts", "read_bytes_per_second")

_DEVIATIONS = 2
"""Standard deviations of the ratio that count as noise."""


@dataclass(frozen=True)
class Comparison:
    """One row of both results.

    Attributes:
        model, test, isa, threads, tables, kv: of the row; "A → B" where they differ.
        a, b: medians in tokens per second.
        ratio: b / a.
        noise: half the width of the noise band around a ratio of 1: two standard deviations of the
            ratio of single repetitions. None where a result has one repetition only.
        bandwidth: ratio of the read bandwidths measured beside the rows.
        verdict: "faster", "slower", "same" (within the band), "unknown" (no band).
    """

    model: str
    test: str
    isa: str
    threads: str
    tables: str
    kv: str
    a: float
    b: float
    ratio: float
    noise: float | None
    bandwidth: float
    verdict: str


def compare(first: Path, second: Path, output: str) -> int:
    """Print what two files of results have in common; 1 if the second is slower somewhere, else 0.

    Raises:
        ModelFileError: a file holds something else.
        OptionError: they are of other models, or have no workload in common.
        OSError: a file cannot be read.
    """
    found = compare_rows(read_rows(first), read_rows(second))
    values = [asdict(one) for one in found]
    if output == "json":
        print(json.dumps(values, indent=2))
    elif output == "jsonl":
        print("\n".join(json.dumps(value) for value in values))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, list(values[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(values)
    else:
        print(_report(first, second, found))
    return EXIT_SLOWER if any(one.verdict == "slower" for one in found) else 0


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of ``-o json`` or ``-o jsonl``; ModelFileError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if text.lstrip().startswith("{") else [f"{text}"]
        values = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a result of tmac-bench -o json: {error}") from error
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not rows:
        raise ModelFileError(f"{path}: no rows")
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{path}: row {number}")
    return list(rows)


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ModelFileError(f"{where}: not an object; allowed: rows of tmac-bench -o json")
    missing = [name for name in (*_MODEL, *_WORKLOAD, *_SETTING, *_NUMBERS) if name not in row]
    if missing or row.get("schema") != SCHEMA:
        reason = f"has no {missing[0]}" if missing else f"schema is {row.get('schema')!r}"
        raise ModelFileError(f"{where}: {reason}; allowed: rows of tmac-bench, schema {SCHEMA}")
    for name in (*_MODEL, *_WORKLOAD, *_SETTING):
        if type(row[name]) not in (int, str):
            raise ModelFileError(f"{where}: {name} is {row[name]!r}; allowed: a number or a name")
    if not isinstance(row.get("samples_ts"), list):
        raise ModelFileError(f"{where}: samples_ts is not a list of numbers")
    for name in _NUMBERS:
        lowest = "from 0 up" if name == "stddev_ts" else "above 0"
        number = row[name]
        real = type(number) in (int, float) and is_finite(number)
        if not real or number < 0 or (number == 0 and name != "stddev_ts"):
            raise ModelFileError(f"{where}: {name} is {number!r}; allowed: numbers {lowest}")


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> list[Comparison]:
    """The rows of both, in the order of ``first``.

    Rows belong together that have model, workload and settings in common. A setting that is one
    for all of ``first`` and another for all of ``second`` is what is compared.

    Raises:
        OptionError: there are no such rows.
    """
    if not {_key(row, _MODEL) for row in first} & {_key(row, _MODEL) for row in second}:
        names = [", ".join(sorted({row["model_type"] for row in rows})) for rows in (first, second)]
        raise OptionError(
            f"the results are of different models: {names[0]} ({_sizes(first)} weights) and "
            f"{names[1]} ({_sizes(second)}); allowed: of the same"
        )
    constant = [
        name
        for name in _SETTING
        if len({row[name] for row in first}) == len({row[name] for row in second}) == 1
    ]
    fields = (*_MODEL, *_WORKLOAD, *(name for name in _SETTING if name not in constant))
    ours, theirs = _by_key(first, fields), _by_key(second, fields)
    if not ours.keys() & theirs.keys():
        raise OptionError("the results have no workload and setting in common")
    return [_compare(row, theirs[key]) for key, row in ours.items() if key in theirs]


def _by_key(rows: Sequence[Row], fields: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    """Of rows that are measured twice, as in two sweeps, the first."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found.setdefault(_key(row, fields), row)
    return found


def _key(row: Row, fields: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in fields)


def _sizes(rows: Sequence[Row]) -> str:
    return ", ".join(f"{n:,}" for n in sorted({row["model_n_params"] for row in rows}))


def _compare(a: Row, b: Row) -> Comparison:
    ratio = b["median_ts"] / a["median_ts"]
    noise = None
    if len(a["samples_ts"]) > 1 and len(b["samples_ts"]) > 1:
        parts = [row["stddev_ts"] / row["avg_ts"] for row in (a, b)]
        noise = _DEVIATIONS * math.hypot(*parts)
    if noise is None:
        verdict = "unknown"
    elif abs(ratio - 1) <= noise:
        verdict = "same"
    else:
        verdict = "faster" if ratio > 1 else "slower"
    texts = {name: [str(row[name]) for row in (a, b)] for name in _SETTING}
    settings = {name: one if one == two else f"{one} → {two}" for name, (one, two) in texts.items()}
    return Comparison(
        model=a["model_type"],
        test=a.get("test", ""),
        isa=settings["isa"],
        threads=settings["n_threads"],
        tables=settings["tables"],
        kv=settings["kv"],
        a=a["median_ts"],
        b=b["median_ts"],
        ratio=ratio,
        noise=noise,
        bandwidth=b["read_bytes_per_second"] / a["read_bytes_per_second"],
        verdict=verdict,
    )


def _report(first: Path, second: Path, found: Sequence[Comparison]) -> str:
    columns: dict[str, list[str]] = {
        "model": [one.model for one in found],
        "isa": [one.isa for one in found],
        "threads": [one.threads for one in found],
        "tables": [one.tables for one in found],
        "kv": [one.kv for one in found],
        "test": [one.test for one in found],
        "A t/s": [f"{one.a:.2f}" for one in found],
        "B t/s": [f"{one.b:.2f}" for one in found],
        "B/A": [f"{one.ratio:.3f}" for one in found],
        "noise": ["n/a" if one.noise is None else f"± {one.noise:.3f}" for one in found],
        "GB/s B/A": [f"{one.bandwidth:.3f}" for one in found],
        "B is": [one.verdict for one in found],
    }
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    lines = [
        f"A: {first}\nB: {second}",
        format_table(rows, right="llrllrrrrrr", indent=""),
        "t/s: medians. noise: two standard deviations of a ratio of single repetitions; GB/s: read "
        "bandwidth\nmeasured beside the rows. Where it changed as well, the machine did.",
    ]
    return "\n\n".join(lines)
