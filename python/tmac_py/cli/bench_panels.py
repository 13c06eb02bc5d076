"""Rows of a sweep as plots: a panel for each workload, a series for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tmac_py.cli.bench_output import format_threads
from tmac_py.cli.bench_rows import Row

AXIS_LABELS = {"threads": "threads", "bits": "bits of the weights", "isa": "instruction set"}


@dataclass(frozen=True)
class Point:
    """Tokens per second: median, standard deviation, and what the machine allows, if known."""

    value: float
    spread: float
    limit: float | None


@dataclass(frozen=True)
class Panel:
    """One workload.

    Attributes:
        title: the workload.
        axis: "threads", "bits" or "isa".
        ticks: what stands along the axis.
        series: for each model its name and a point for each tick.
        limit: what the limits are of, "" where there are none.
    """

    title: str
    axis: str
    ticks: list[str]
    series: dict[str, list[Point]]
    limit: str

    @property
    def top(self) -> float:
        """The largest number in it."""
        points = [point for series in self.series.values() for point in series]
        return max(max(point.value + point.spread, point.limit or 0) for point in points)


def make_panels(axis: str, rows: Sequence[Row]) -> list[Panel]:
    """The panels of the rows of one axis: each model with each value of the axis."""
    places = _places(axis, rows)
    panels = []
    for test in dict.fromkeys(row["test"] for row in rows):
        series: dict[str, list[Point]] = {}
        ticks: dict[str, None] = {}
        for row, (label, tick) in zip(rows, places, strict=True):
            if row["test"] == test:
                point = Point(row["median_ts"], row["stddev_ts"], row["limit_ts"])
                series.setdefault(label, []).append(point)
                ticks[tick] = None
                kind = _limit_kind(row)
        panels.append(Panel(test, axis, list(ticks), series, kind))
    return panels


def subtitle(axis: str, rows: Sequence[Row]) -> str:
    """What is the same in all rows: model, instruction set, threads, and the processor."""
    parts = {
        "model": [label for label, _ in _places(axis, rows)],
        "isa": [row["isa"] for row in rows],
        "threads": [format_threads(row["n_threads"]) for row in rows],
        "cpu": [row["cpu_info"] for row in rows],
    }
    same = [texts[0] for texts in parts.values() if texts[0] and len(set(texts)) == 1]
    return f"{AXIS_LABELS[axis]}; {', '.join(same)}"


def _places(axis: str, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Series and tick of each row: model, and threads, bits or instruction set."""
    if axis == "bits":
        return _bit_places(rows)
    field = {"threads": "n_threads", "isa": "isa"}[axis]
    return [(_short(row["model_filename"]), str(row[field])) for row in rows]


def _bit_places(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Of models whose bits differ: a series for each synthetic shape, one for files."""
    if all(":" in row["model_filename"] for row in rows):
        parts = [row["model_filename"].partition(":") for row in rows]
        return [(shape, weights.removesuffix("bit")) for shape, _, weights in parts]
    kinds = {row["model_filename"]: row["model_type"].partition(" ")[2] for row in rows}
    if len(set(kinds.values())) < len(kinds):
        kinds = {name: f"{kind}\n{_short(name)}" for name, kind in kinds.items()}
    return [("", kinds[row["model_filename"]]) for row in rows]


def _limit_kind(row: Row) -> str:
    if row["limit_ts"] is None:
        return ""
    return "int8 multiply peak" if row["n_prompt"] else "read bandwidth"


def _short(name: str) -> str:
    """A path without its folder; other names as they are."""
    return Path(name).name if name.endswith((".lut", ".gguf")) else name
