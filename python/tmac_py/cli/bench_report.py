"""``tmac bench --report``: a machine and what it reaches, in Markdown that can be pasted."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from tmac_py.cli.bench_output import MarkdownWriter, format_size, format_threads, setting_columns
from tmac_py.cli.bench_rows import Row, measure_rows

if TYPE_CHECKING:
    from tmac_py.benchmark import Setting, Workload

_UNKNOWN = "n/a"


def report(
    models: Iterable[tuple[str, Path]],
    workloads: Sequence[Workload],
    settings: Sequence[Setting],
    repetitions: int,
) -> None:
    """Print the machine, the rows as they come, and what the machine went through meanwhile.

    Arguments and errors as of :func:`tmac_py.cli.bench_rows.measure_rows`.
    """
    from tmac_py.sensors import Throttling, cpu_celsius, find_energy_meter

    energy = find_energy_meter()
    throttling, celsius, load = Throttling.read(), cpu_celsius(), _load()
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    print(f"## tmac-bench report, {now}\n\n{_facts(machine_facts())}\n", flush=True)
    writer = MarkdownWriter(setting_columns(settings))
    rows = []
    for row in measure_rows(models, workloads, settings, repetitions, energy.meter):
        writer.add(row)
        rows.append(row)
    during = {
        "read bandwidth": _bandwidths(rows),
        "energy": energy.meter.name if energy.meter else f"{_UNKNOWN}: {energy.reason}",
        "temperature": f"{_celsius(celsius)} before, {_celsius(cpu_celsius())} after",
        "throttling": Throttling.read().since(throttling),
        "other load": f"{load} before (processes that ran or waited, mean of a minute)",
    }
    print(f"\n{_facts(during)}")


def machine_facts() -> dict[str, str]:
    """What this machine and this installation are, for people."""
    from tmac_py import _core, machine

    total, available = machine.memory_bytes()
    clock = machine.clock_hertz()
    quota = machine.cpu_quota()
    allowed = "" if quota is None else f", {quota:g} by control group"
    usable = [isa["name"] for isa in _core.isas() if isa["usable"]]
    return {
        "machine": machine.board_name() or _UNKNOWN,
        "CPU": machine.cpu_name(),
        "cores": f"{machine.physical_cores()} physical, {len(machine.usable_cpus())} logical"
        f"{allowed}",
        "instruction sets": f"{', '.join(usable)}; used: {_core.active_isa()}",
        "memory": _UNKNOWN
        if total is None
        else f"{format_size(total)}, {format_size(available)} available",
        "governor": ", ".join(machine.governors()) or _UNKNOWN,
        "highest clock": _UNKNOWN if clock is None else f"{clock / 1e9:.2f} GHz",
        "power": machine.power_source() or _UNKNOWN,
        "system": f"{_system()}, kernel {platform.release()}, {platform.machine()}",
        "tmac_py": f"{_core.__version__}, {_core.compiler}",
        "Python": platform.python_version(),
    }


def _facts(facts: dict[str, str]) -> str:
    rows = [f"| {name} | {text.replace('|', '/')} |" for name, text in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):  # Windows
        return _UNKNOWN


def _celsius(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0f} °C"


def _bandwidths(rows: Sequence[Row]) -> str:
    """Medians for each number of threads."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["n_threads"], []).append(row["read_bytes_per_second"] / 1e9)
    return ", ".join(
        f"{statistics.median(rates):.1f} GB/s with {format_threads(threads)}"
        for threads, rates in found.items()
    )
