"""Panels of a sweep as text for a terminal, and as a PNG (extra ``plot``)."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tmac_py.cli.bench_panels import AXIS_LABELS, Panel, Point
from tmac_py.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (5.2, 4.2)
_TICK_CHARACTERS = 45
"""More do not fit side by side below a panel."""

_BAR_SHARE = 0.8
"""Of the room of a tick, for the bars of all series together."""


def need_matplotlib() -> None:
    """OptionError, before anything is measured, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            "pictures need matplotlib: pip install 'tmac_py[plot]', "
            "or --no-plots for the terminal alone"
        )


def text_plot(panel: Panel, out: TextIO, width: int | None = None) -> str:
    """A bar for each point, with a mark at its limit.

    Args:
        panel: what to draw.
        out: where it will be printed; decides on the characters.
        width: columns, None for those of the terminal.
    """
    names = [
        f"{label}  {tick}" if len(panel.series) > 1 else tick.replace("\n", " ")
        for label in panel.series
        for tick in panel.ticks
    ]
    points = [point for series in panel.series.values() for point in series]
    texts = [f"{point.value:.2f} ± {point.spread:.2f}" for point in points]
    left, right = max(map(len, names)), max(map(len, texts))
    columns = width or shutil.get_terminal_size().columns
    room = max(10, columns - left - right - 6)
    full = "█" if (out.encoding or "").lower().replace("-", "").startswith("utf") else "#"
    head = f"{panel.title}, tokens/s" + (f"; | = limit by {panel.limit}" if panel.limit else "")
    lines = [
        f"  {name:>{left}}  {_bar(point, room / panel.top, room, full)}  {text:>{right}}"
        for name, point, text in zip(names, points, texts, strict=True)
    ]
    return "\n".join([head, *lines, ""])


def _bar(point: Point, scale: float, room: int, full: str) -> str:
    bar = (full * round(point.value * scale)).ljust(room)
    if point.limit is not None:
        mark = min(room - 1, round(point.limit * scale))
        bar = f"{bar[:mark]}|{bar[mark + 1 :]}"
    return bar


def save(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Write a PNG with the panels side by side. Needs matplotlib; OSError if it cannot write."""
    from matplotlib.figure import Figure

    inches = (max(7.0, _PANEL_INCHES[0] * len(panels)), _PANEL_INCHES[1])
    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axes in zip(panels, grid, strict=True):
        (_draw_lines if panel.axis == "threads" else _draw_bars)(panel, axes)
        limit = f" (dashed: limit by {panel.limit})" if panel.limit else ""
        axes.set_title(f"{panel.title}{limit}", fontsize=10)
        axes.set_xlabel(AXIS_LABELS[panel.axis])
        axes.set_ylabel("tokens/s (median ± standard deviation)")
        axes.set_ylim(0, panel.top * 1.08)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    if any(panels[0].series):
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png")


def _draw_lines(panel: Panel, axes: Axes) -> None:
    xs = [int(tick) for tick in panel.ticks]
    for index, (label, points) in enumerate(panel.series.items()):
        color = f"C{index}"
        values, spreads = [p.value for p in points], [p.spread for p in points]
        axes.errorbar(xs, values, spreads, color=color, marker="o", capsize=3, label=label)
        limits = [math.nan if p.limit is None else p.limit for p in points]
        axes.plot(xs, limits, color=color, ls="--", lw=1)
    axes.set_xticks(xs)


def _draw_bars(panel: Panel, axes: Axes) -> None:
    width = _BAR_SHARE / len(panel.series)
    for index, (label, points) in enumerate(panel.series.items()):
        color = f"C{index}"
        xs = [i + (index - (len(panel.series) - 1) / 2) * width for i in range(len(points))]
        values, spreads = [p.value for p in points], [p.spread for p in points]
        axes.bar(xs, values, width * 0.9, yerr=spreads, color=color, capsize=3, label=label)
        limits = [(x, p.limit) for x, p in zip(xs, points, strict=True) if p.limit is not None]
        if limits:
            axes.hlines(
                [limit for _, limit in limits],
                [x - width / 2 for x, _ in limits],
                [x + width / 2 for x, _ in limits],
                color="black" if len(panel.series) == 1 else color,
                ls="--",
            )
    axes.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=8)
    if sum(map(len, panel.ticks)) > _TICK_CHARACTERS:
        axes.tick_params(axis="x", rotation=20)
