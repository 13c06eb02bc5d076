"""The kernel benchmark as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from alternate import Roof, Roofs
from contestants import OURS
from kernel_rows import BEST_PEER, Ratio, Row, Total
from measure import Spread, describe, describe_load
from table_build import TableBuild

from tmac_py.cli.tables import format_table


def report(
    facts: dict[str, Any],
    rows: Sequence[Row],
    sums: Sequence[Total],
    builds: Sequence[TableBuild],
    roofs: Roofs,
) -> str:
    """The text that is printed."""
    parts = [format_table(_heading(facts, roofs), indent=""), _table(rows)]
    if len({row.case.matrix.size for row in rows if row.case.source == "memory"}) > 1:
        parts += ["All matrices, each as often as the model has it:", _totals(sums)]
    if builds:
        parts += [
            "Table build, m = k = 4096 from memory, one vector (time of a tile of 32 rows):",
            _builds(builds),
        ]
    return "\n\n".join(parts)


def drift(log: Sequence[Roof]) -> float:
    """The median of the last third of the measurements over that of the first, minus one."""
    third = max(1, len(log) // 3)
    values = [roof.value for roof in log]
    return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1


def _heading(facts: dict[str, Any], roofs: Roofs) -> list[tuple[str, str]]:
    lines = describe(facts)
    for name, peer in facts["peers"].items():
        features = " ".join(peer["features"])
        lines.append((name, f"{peer['package']} {peer['version']}: {features}"))
    for what, unit, logs in (
        ("memory read", "GB/s", roofs.bandwidth),
        ("multiply peak", "G int8 multiply-adds/s", roofs.multiply),
    ):
        for threads, log in logs.items():
            if log:
                spread = Spread.of([roof.value / 1e9 for roof in log])
                text = f"{spread} {unit}, {len(log)} times, drift {drift(log):+.0%}"
                lines.append((f"{what}, threads {threads}", text))
    lines.append(("others", describe_load(facts["other_load_cpus"])))
    lines += [("note", note) for note in facts["notes"]]
    return lines


def _table(rows: Sequence[Row]) -> str:
    table = [
        (
            "matrix",
            "bits",
            "threads",
            "n",
            "from",
            "kernel",
            "us (lowest-highest)",
            "GB/s",
            "G weights/s",
            "of roof",
            "ratio of pairs",
            "to the best peer",
        )
    ]
    for row in rows:
        case = row.case
        microseconds = Spread(
            *(value * 1e6 for value in (row.seconds.median, row.seconds.low, row.seconds.high))
        )
        roof = "multiply" if case.many_tokens else "read"
        ratio, to = _compared(row)
        table.append(
            (
                case.matrix.label,
                case.encoding,
                str(case.threads),
                str(case.n),
                case.source,
                row.kernel if row.party == OURS else f"{row.party} {row.kernel}",
                str(microseconds),
                f"{row.gb_s:.1f}",
                f"{row.weights_s / 1e9:.1f}",
                "" if row.share is None else f"{row.share.median:.0%} {roof}",
                ratio,
                to,
            )
        )
    return format_table(table, right="llrrllrrrrrl", indent="")


def _compared(row: Row) -> tuple[str, str]:
    ratios = [row.ratio] if row.ratio_any in (None, row.ratio) else [row.ratio, row.ratio_any]
    found: list[Ratio] = [ratio for ratio in ratios if ratio is not None]
    return (
        "; ".join(str(ratio.value) for ratio in found),
        "; ".join(f"{ratio.party} {ratio.kernel}" for ratio in found),
    )


def _totals(sums: Sequence[Total]) -> str:
    peers = {(t.encoding, t.threads, t.n): t for t in sums if t.party == BEST_PEER}
    table = [("bits", "threads", "n", "kernel", "ms", "GB/s", "G weights/s", "ratio", "to")]
    for total in sums:
        if total.party != OURS:
            continue
        peer = peers.get((total.encoding, total.threads, total.n))
        comparable = peer is not None and peer.work == total.work
        table.append(
            (
                total.encoding,
                str(total.threads),
                str(total.n),
                total.kernel,
                f"{total.seconds * 1e3:.1f}",
                f"{total.nbytes / total.seconds / 1e9:.1f}",
                f"{total.weights_s / 1e9:.1f}",
                f"{peer.seconds / total.seconds:.2f}" if peer and comparable else "",
                peer.kernel if peer and comparable else "",
            )
        )
    return format_table(table, right="lrrlrrrrl", indent="")


def _builds(builds: Sequence[TableBuild]) -> str:
    table = [("bits", "threads", "kernel", "us of the tile", "us of the product", "share")]
    for build in builds:
        percent = Spread(
            *(100 * v for v in (build.share.median, build.share.low, build.share.high))
        )
        table.append(
            (
                build.encoding,
                str(build.threads),
                f"{build.isa} {build.tables}",
                f"{build.tile_seconds * 1e6:.1f}",
                f"{build.product_seconds * 1e6:.1f}",
                f"{percent} %",
            )
        )
    return format_table(table, right="lrlrrr", indent="")
