"""What the benchmarks share: medians and spreads, facts about machine and build, read bandwidth."""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmac_py import _core
from tmac_py.machine import cpu_name, default_threads, memory_bytes, physical_cores

_SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements, and how far they reach."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))

    def __str__(self) -> str:
        low, high = _short(self.low), _short(self.high)
        return f"{_short(self.median)} ({low}-{high})"


def _short(value: float) -> str:
    """Three digits: "0.123", "12.3", "1234"."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def machine_facts() -> dict[str, Any]:
    """CPU, cores, instruction set, compiler, versions, commit."""
    return {
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tmac_py": _core.__version__,
        "compiler": _core.compiler,
        "isa": _core.active_isa(),
        "commit": commit(),
    }


def describe(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of text for :func:`machine_facts`."""
    cache = facts["last_level_cache_bytes"]
    cached = "" if cache is None else f", last-level cache {cache / (1 << 20):.0f} MiB"
    return [
        ("cpu", f"{facts['cpu']}, {facts['physical_cores']} cores{cached}"),
        ("tmac_py", f"{facts['tmac_py']}, commit {facts['commit'] or 'unknown'}"),
        ("build", f"{facts['compiler']}, isa {facts['isa']}"),
        ("python", f"{facts['python']}, numpy {facts['numpy']}, {facts['platform']}"),
    ]


class OtherLoad:
    """How many CPUs other programs, and other guests of the host, kept busy meanwhile."""

    def __init__(self) -> None:
        self._start = self._now()

    def cpus(self) -> float | None:
        """On average since the start; None where the system does not tell.

        Children of this process count as others until they have ended.
        """
        now = self._now()
        if now is None or self._start is None:
            return None
        all_busy, own, clock = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, all_busy - own) / clock

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """CPU seconds of everything, of this process and its ended children; clock seconds."""
        try:
            fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, fields)
        ticks = user + nice + system + irq + soft_irq + steal
        own = os.times()
        seconds = own.user + own.system + own.children_user + own.children_system
        return ticks / os.sysconf("SC_CLK_TCK"), seconds, own.elapsed


def commit() -> str | None:
    """The commit of the source tree, "+changes" if files differ from it; None without git."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def last_level_cache_bytes(caches: Path = _SYSFS_CACHES) -> int | None:
    """Size of the largest cache of the first CPU; None where the system does not tell."""
    sizes = []
    for path in caches.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
            sizes.append(int(found[1]) * _UNIT_BYTES[found[2]])
    return max(sizes, default=None)


def cache_bytes(level: int, caches: Path = _SYSFS_CACHES) -> int | None:
    """Size of the first CPU's cache of a level (data or both); None where unknown."""
    for index in sorted(caches.glob("index*")):
        try:
            is_level = (index / "level").read_text().strip() == str(level)
            is_data = (index / "type").read_text().strip() != "Instruction"
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        except OSError:
            continue
        if is_level and is_data and size:
            return int(size[1]) * _UNIT_BYTES[size[2]]
    return None


def memory_buffer_bytes() -> int:
    """Four times the last-level cache, at least 256 MiB, at most a quarter of the free memory."""
    _, available = memory_bytes()
    size = max(4 * (last_level_cache_bytes() or 0), 256 << 20)
    return size if available is None else min(size, available // 4)


def describe_load(cpus: float | None) -> str:
    """What :meth:`OtherLoad.cpus` found, in words."""
    if cpus is None:
        return "unknown"
    note = "" if cpus < 0.1 else ": the machine was not quiet, repeat the run"
    return f"kept {cpus:.2f} CPUs busy on average{note}"


def default_thread_counts() -> list[int]:
    """One thread, and as many as the package uses by default."""
    return sorted({1, default_threads()})


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def positive_list(text: str) -> list[int]:
    """An argument as "1,2,4"."""
    return [positive(part) for part in text.split(",")]
