"""How ``tmac bench`` prints its rows: a Markdown table, JSON, JSON lines, CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from tmac_py.cli.bench_rows import Row

if TYPE_CHECKING:
    from tmac_py.benchmark import Setting


class Writer(Protocol):
    """Prints rows as they come."""

    def add(self, row: Row) -> None:
        """One more row."""

    def end(self) -> None:
        """There are no more."""


def make_writer(output: str, *, extra: Iterable[str] = ()) -> Writer:
    """A writer of the format ``output``; ``extra`` columns of a Markdown table: "tables", "kv"."""
    makers: dict[str, Callable[[], Writer]] = {
        "md": lambda: MarkdownWriter(extra),
        "json": JsonWriter,
        "jsonl": JsonLinesWriter,
        "csv": CsvWriter,
    }
    return makers[output]()


def setting_columns(settings: Sequence[Setting]) -> list[str]:
    """Columns that a table needs because of what was asked for: "tables", "kv"."""
    return ["tables"] * any(setting.tables for setting in settings) + ["kv"] * any(
        setting.kv != "f16" for setting in settings
    )


_COLUMNS: dict[str, tuple[int, Callable[[Row], str]]] = {
    "model": (22, lambda row: row["model_type"]),
    "size": (9, lambda row: format_size(row["model_size"])),
    "params": (7, lambda row: _count(row["model_n_params"])),
    "isa": (11, lambda row: row["isa"]),
    "threads": (7, lambda row: str(row["n_threads"])),
    "tables": (6, lambda row: row["tables"]),
    "kv": (9, lambda row: row["kv"]),
    "test": (15, lambda row: row["test"]),
    "t/s": (17, lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    "median": (8, lambda row: f"{row['median_ts']:.2f}"),
    "GB/s": (5, lambda row: _rate(row)),
    "limit": (18, lambda row: _limit(row)),
    "first token": (11, lambda row: _milliseconds(row["first_token_ns"])),
    "load": (8, lambda row: _milliseconds(row["load_ns"])),
    "peak RSS": (9, lambda row: format_size(row["peak_rss_bytes"])),
    "J/token": (7, lambda row: _joules(row["joules_per_token"])),
}
"""Width and text of each column."""


class MarkdownWriter:
    """A table that grows row by row, with the limit beside what was reached."""

    def __init__(self, extra: Iterable[str] = ()) -> None:
        hidden = {"tables", "kv"} - set(extra)
        self._columns = {name: _COLUMNS[name] for name in _COLUMNS if name not in hidden}
        self._begun = False

    def add(self, row: Row) -> None:
        """Print the row, below a head if it is the first."""
        if not self._begun:
            self._line(self._columns)
            self._line("-" * (width - 1) + ":" for width, _ in self._columns.values())
            self._begun = True
        self._line(text(row) for _, text in self._columns.values())

    def end(self) -> None:
        """Nothing is left to print."""

    def _line(self, cells: Iterable[str]) -> None:
        widths = (width for width, _ in self._columns.values())
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        print(f"| {' | '.join(padded)} |", flush=True)


class JsonWriter:
    """One array at the end."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keep the row."""
        self._rows.append(row)

    def end(self) -> None:
        """Print all of them."""
        print(json.dumps(self._rows, indent=2))


class JsonLinesWriter:
    """One object a line, as soon as it is known."""

    def add(self, row: Row) -> None:
        """Print the row."""
        print(json.dumps(row), flush=True)

    def end(self) -> None:
        """Nothing is left to print."""


class CsvWriter:
    """One line a row; lists are JSON, and what is not known is empty."""

    def __init__(self) -> None:
        self._begun = False

    def add(self, row: Row) -> None:
        """Print the row, below the names of its fields if it is the first."""
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if not self._begun:
            writer.writerow(row)
            self._begun = True
        writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in row.values())
        sys.stdout.flush()

    def end(self) -> None:
        """Nothing is left to print."""


def format_size(nbytes: int | None) -> str:
    """Binary units: "93.8 MiB"; "n/a" for None."""
    if nbytes is None:
        return "n/a"
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def format_threads(number: int) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} thread{'s' * (number != 1)}"


def _rate(row: Row) -> str:
    rate = row["weight_bytes_per_second"]
    return "" if rate is None else f"{rate / 1e9:.1f}"


def _limit(row: Row) -> str:
    share = row["limit_share"]
    if share is None:
        return ""
    if row["n_prompt"]:
        return f"{share:.0%} of {row['multiply_adds_per_second'] / 1e9:.0f} GMAC/s"
    return f"{share:.0%} of {row['read_bytes_per_second'] / 1e9:.1f} GB/s"


def _milliseconds(nanoseconds: int | None) -> str:
    return "" if nanoseconds is None else f"{nanoseconds / 1e6:.4g} ms"


def _joules(joules: float | None) -> str:
    return "n/a" if joules is None else f"{joules:.3g}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
