"""The roofline picture: multiply-adds a second over multiply-adds for a byte of weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alternate import Roofs
from contestants import OURS
from kernel_rows import Total
from measure import Spread

MARKERS = "os^vP*Xd"
PANEL_INCHES = (6.2, 5.2)
LEGEND_INCHES = 2.6
GREY = "#555555"
HOLLOW = {"marker": "D", "markersize": 6, "markerfacecolor": "none", "markeredgewidth": 1.4}


class MatplotlibMissing(RuntimeError):  # noqa: N818
    """The picture needs a package that is not installed."""


def need_matplotlib() -> None:
    """Raises :exc:`MatplotlibMissing` before anything is measured."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise MatplotlibMissing(
            "the roofline picture needs matplotlib; install it with: pip install matplotlib"
        ) from None


def draw(path: Path, sums: Sequence[Total], roofs: Roofs, *, title: str) -> None:
    """Write a PNG with a panel for each number of threads."""
    need_matplotlib()
    figures = importlib.import_module("matplotlib.figure")
    counts = sorted({total.threads for total in sums})
    size = (PANEL_INCHES[0] * len(counts) + LEGEND_INCHES, PANEL_INCHES[1])
    figure = figures.Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(1, len(counts), sharex=True, sharey=True, squeeze=False)[0]
    style = _Style(sums)
    left = min(total.intensity for total in sums) / 2
    right = max(total.intensity for total in sums) * 3
    slanted = []
    for panel, threads in zip(panels, counts, strict=True):
        _prepare(panel, threads)
        _draw_points(panel, [total for total in sums if total.threads == threads], style)
        slanted.append(_draw_roofs(panel, roofs, threads, left, right))
        panel.set_xlim(left, right)
    panels[0].set_ylabel("10⁹ multiply-adds per second")
    low = min(total.weights_s for total in sums) / 1e9
    panels[0].set_ylim(bottom=low / 2.5)
    figure.legend(handles=style.legend(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.draw_without_rendering()  # the layout is known from here on
    for panel, label in zip(panels, slanted, strict=True):
        if label is not None:
            (x0, y0), (x1, y1) = panel.transData.transform([(1, 1), (10, 10)])
            label.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
    figure.savefig(path)


class _Style:
    """A colour for each encoding, a marker for each of our kernels; peers are hollow."""

    def __init__(self, sums: Sequence[Total]) -> None:
        colors = importlib.import_module("matplotlib").colormaps["turbo"]
        encodings = list(dict.fromkeys(total.encoding for total in sums))
        step = 0.84 / max(1, len(encodings) - 1)
        self._colors = {name: colors(0.08 + i * step) for i, name in enumerate(encodings)}
        kernels = dict.fromkeys(total.kernel for total in sums if total.party == OURS)
        self._markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(kernels)}
        self._peers = any(total.party != OURS for total in sums)

    def of(self, total: Total) -> dict[str, Any]:
        color = self._colors[total.encoding]
        if total.party != OURS:
            return {**HOLLOW, "markeredgecolor": color}
        return {
            "marker": self._markers[total.kernel],
            "markersize": 6.5,
            "markerfacecolor": color,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }

    def legend(self) -> list[Any]:
        line = importlib.import_module("matplotlib.lines").Line2D
        patch = importlib.import_module("matplotlib.patches").Patch
        entries = [
            patch(color=color, label=_bits_name(name)) for name, color in self._colors.items()
        ]
        entries += [
            line([], [], linestyle="none", label=name, marker=marker, markersize=7, color=GREY)
            for name, marker in self._markers.items()
        ]
        if self._peers:
            style = {**HOLLOW, "markeredgecolor": GREY}
            entries.append(line([], [], linestyle="none", label="best peer, same bits", **style))
        return entries


def _bits_name(encoding: str) -> str:
    if not encoding.isdigit():
        return encoding
    return "1 bit" if encoding == "1" else f"{encoding} bits"


def _prepare(panel: Any, threads: int) -> None:
    panel.set_title("1 thread" if threads == 1 else f"{threads} threads", fontsize=11)
    panel.set_xlabel("multiply-adds for a byte of stored weights")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticker = importlib.import_module("matplotlib.ticker")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    panel.grid(which="major", color="#e4e4e4", linewidth=0.6, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_points(panel: Any, totals: Sequence[Total], style: _Style) -> None:
    for total in totals:
        panel.plot(
            total.intensity, total.weights_s / 1e9, linestyle="none", zorder=3, **style.of(total)
        )
    for n in sorted({total.n for total in totals}):
        group = [total for total in totals if total.n == n]
        lowest = min(total.intensity for total in group)
        highest = max(total.intensity for total in group)
        panel.annotate(
            f"n = {n}",
            (math.sqrt(lowest * highest), min(total.weights_s for total in group) / 1e9),
            xytext=(0, -20),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=GREY,
        )


def _draw_roofs(panel: Any, roofs: Roofs, threads: int, left: float, right: float) -> Any:
    """Medians as lines, from the lowest to the highest as bands; returns the slanted label."""
    read, multiply = (
        Spread.of([roof.value / 1e9 for roof in log]) if log else None
        for log in (roofs.bandwidth[threads], roofs.multiply[threads])
    )
    line = {"color": "black", "linewidth": 1.2, "zorder": 2}
    band = {"color": "black", "alpha": 0.08, "linewidth": 0, "zorder": 1}
    label = None
    if read:
        end = multiply.median / read.median if multiply else right
        xs = [left, end]
        panel.plot(xs, [x * read.median for x in xs], **line)
        panel.fill_between(xs, [x * read.low for x in xs], [x * read.high for x in xs], **band)
        label = panel.annotate(
            f"read {read.median:.1f} GB/s",
            (left * 1.3, left * 1.3 * read.median),
            xytext=(-6, 8),
            textcoords="offset points",
            rotation_mode="anchor",
            fontsize=9,
        )
    if multiply:
        start = multiply.median / read.median if read else left
        panel.plot([start, right], [multiply.median] * 2, **line)
        panel.fill_between([start, right], [multiply.low] * 2, [multiply.high] * 2, **band)
        panel.annotate(
            f"int8 multiply peak {multiply.median:.0f}",
            (right, multiply.median),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    return label
