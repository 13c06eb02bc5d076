"""What this computer is: cores a process may use, CPU and board, memory, clock, power."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from tmac_py.errors import OptionError

MAX_THREADS = 1024
"""The most threads that the core computes with."""

_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}


def default_threads() -> int:
    """$TMAC_THREADS, else the performance cores this process may use within its CPU quota.

    Raises OptionError for a TMAC_THREADS that is not a whole number from 1 to MAX_THREADS.
    """
    if wanted := os.environ.get("TMAC_THREADS"):
        if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_THREADS:
            raise OptionError(f"TMAC_THREADS is {wanted!r}; allowed: 1 to {MAX_THREADS}")
        return int(wanted)
    cores = physical_cores()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def usable_cpus() -> set[int]:
    """Logical CPUs of this process's affinity (all of them where there is no affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int] | None = None, sysfs: Path = Path("/sys")) -> int:
    """Cores among ``cpus`` (default: the affinity): hyper-threads count once, slow cores do not.

    Slow cores are Intel's efficiency cores and those below half the capacity of the fastest; where
    all of ``cpus`` are slow, all count. Without topology in ``sysfs`` every CPU is a core.
    """
    cpus = usable_cpus() if cpus is None else cpus
    fast = _cpu_list(sysfs / "devices/cpu_core/cpus") & cpus or cpus
    capacity = {cpu: _cpu_number(sysfs, cpu, "cpu_capacity") for cpu in fast}
    largest = max(capacity.values())
    fast = {cpu for cpu in fast if 2 * capacity[cpu] >= largest}
    cores = set()
    for cpu in fast:
        topology = sysfs / f"devices/system/cpu/cpu{cpu}/topology"
        siblings = _cpu_list(topology / "core_cpus_list") or _cpu_list(
            topology / "thread_siblings_list"
        )
        cores.add(min(siblings | {cpu}))
    return max(1, len(cores))


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """CPUs that the control groups (version 1 or 2) of this process allow, None for no limit."""
    limits = []
    for folder in _cgroup_folders(proc, "cpu"):
        if (version2 := read_text(folder / "cpu.max").split()) and len(version2) == 2:
            quota, period = version2
        else:
            quota = read_text(folder / "cpu.cfs_quota_us")
            period = read_text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_bytes(proc: Path = Path("/proc")) -> tuple[int | None, int | None]:
    """Total and available memory in bytes, the control groups' limit included; None if unknown."""
    found: list[tuple[str, str]] = re.findall(r"(\w+):\s+(\d+) kB", read_text(proc / "meminfo"))
    values = {name: int(kilobytes) * 1024 for name, kilobytes in found}
    if "MemTotal" not in values:
        return None, None
    total = values["MemTotal"]
    available = values.get("MemAvailable", total)
    for folder in _cgroup_folders(proc / "self", "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = read_text(folder / limit_name), read_text(folder / used_name)
            if limit.isdecimal() and int(limit) < total:
                total = int(limit)
                available = min(available, total - int(used) if used.isdecimal() else total)
    return total, max(available, 0)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it, e.g. "AMD Ryzen 9 7950X"."""
    text = read_text(cpuinfo)
    fields = dict(re.findall(r"^([^\t\n:]+?)\s*:[ \t]*(.+)$", text, flags=re.MULTILINE))
    part = fields.get("CPU part", "").lower()
    name = fields.get("model name") or _ARM_PARTS.get(part) or fields.get("Model")
    if name is None and part:
        name = f"implementer {fields.get('CPU implementer', '?')}, part {part}"
    return " ".join((name or platform.processor() or platform.machine() or "unknown").split())


def board_name(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> str | None:
    """The computer's model, as "Raspberry Pi 5 Model B Rev 1.0" or "LENOVO 21CB ThinkPad X1"."""
    if name := read_text(proc / "device-tree/model"):
        return name
    dmi = sysfs / "class/dmi/id"
    names = ("sys_vendor", "product_name", "product_version")
    parts = dict.fromkeys(text for name in names if (text := read_text(dmi / name)))
    return " ".join(" ".join(parts).split()) or None


def governors(cpus: set[int] | None = None, sysfs: Path = Path("/sys")) -> list[str]:
    """Who sets the clock of ``cpus`` (default: the affinity): "performance", "ondemand", ..."""
    files = _cpufreq(cpus, sysfs, "scaling_governor")
    return sorted({text for file in files if (text := read_text(file))})


def clock_hertz(cpus: set[int] | None = None, sysfs: Path = Path("/sys")) -> float | None:
    """The highest clock that any of ``cpus`` (default: the affinity) may run at."""
    limits = [read_number(file) for file in _cpufreq(cpus, sysfs, "scaling_max_freq")]
    return max((1e3 * kilohertz for kilohertz in limits if kilohertz is not None), default=None)


def _cpufreq(cpus: set[int] | None, sysfs: Path, name: str) -> list[Path]:
    folder = sysfs / "devices/system/cpu"
    return [
        folder / f"cpu{n}/cpufreq/{name}" for n in sorted(usable_cpus() if cpus is None else cpus)
    ]


def power_source(sysfs: Path = Path("/sys")) -> str | None:
    """ "battery" or "mains", None where the system does not tell."""
    supplies = [
        path
        for path in (sysfs / "class/power_supply").glob("*")
        if read_text(path / "scope") != "Device"  # batteries of mice and the like
    ]
    if any(read_text(supply / "status") == "Discharging" for supply in supplies):
        return "battery"
    if any(read_text(supply / "online") == "1" for supply in supplies):
        return "mains"
    return None


def _cgroup_folders(proc: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its parents, versions 1 and 2, as mounted."""
    groups = {}  # controller ("" for version 2) -> path of the group
    for line in read_text(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        groups.update(dict.fromkeys(names.split(","), path))
    for line in read_text(proc / "mountinfo").splitlines():
        mount, separator, kind = line.partition(" - ")
        if not separator or len(mount.split()) < 5 or len(kind.split()) < 3:
            continue
        root, point = mount.split()[3:5]
        filesystem, options = kind.split()[0], kind.split()[2].split(",")
        if filesystem == "cgroup2":
            group = groups.get("")
        elif filesystem == "cgroup" and controller in options:
            group = groups.get(controller)
        else:
            continue
        if group is None:
            continue
        inside = os.path.relpath(group, root) if group.startswith(root) else "."
        folder = Path(point, inside)
        yield from (folder, *(up for up in folder.parents if up.is_relative_to(point)))


def _cpu_list(path: Path) -> set[int]:
    """CPUs of a list as "0-3,8,10-11"; empty when the file is missing."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", read_text(path))
    return {cpu for low, high in ranges for cpu in range(int(low), int(high or low) + 1)}


def _cpu_number(sysfs: Path, cpu: int, name: str) -> int:
    return read_number(sysfs / f"devices/system/cpu/cpu{cpu}" / name) or 0


def read_text(path: Path) -> str:
    """What stands in a file of the system, without white space around it; "" if unreadable."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n")
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """The whole number in a file of the system, None if there is none."""
    try:
        return int(read_text(path))
    except ValueError:
        return None
