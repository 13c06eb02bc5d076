"""What running takes, as far as this machine tells: energy, heat, throttling, memory.

Everything comes from the system; what has no sensor here, or one that may not be read, is None.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tmac_py.machine import read_number, read_text

Vcgencmd = Callable[[str], str]
"""Answers of a Raspberry Pi's firmware to a command, "" where there are none."""

_SHORTEST = 1.0
"""Seconds that energy is measured over at least: slow sensors have several readings in it."""

_INTERVAL = 0.1
"""Seconds between two readings of a sensor of power."""

_PI_EVENTS = {
    16: "under-voltage",
    17: "capped frequency",
    18: "throttling",
    19: "soft temperature limit",
}
"""Bits of ``vcgencmd get_throttled`` that stay set since boot; 16 below each: now."""


def vcgencmd(command: str) -> str:
    """What a Raspberry Pi's ``vcgencmd`` answers, "" on other machines."""
    program = shutil.which("vcgencmd")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, command], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


class EnergyMeter(ABC):
    """A sensor of energy; ``name`` says which, and of what."""

    name: str

    def joules(self, run: Callable[[], object], *, seconds: float = _SHORTEST) -> float | None:
        """Energy of one ``run``: the mean of as many as ``seconds`` take, at least one.

        Whatever else the machine does meanwhile is part of it. None where the sensor fails.
        """
        self._begin()
        started = perf_counter()
        runs = 0
        try:
            while runs == 0 or perf_counter() - started < seconds:
                run()
                runs += 1
        finally:
            total = self._end()
        return None if total is None else total / runs

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self) -> float | None:
        """Joules since :meth:`_begin`."""


class RaplMeter(EnergyMeter):
    """Counters of the processor's energy (Intel and AMD) in ``/sys/class/powercap``.

    Args:
        zones: folders with ``energy_uj`` and ``max_energy_range_uj``, and the names of what they
            measure.
    """

    def __init__(self, zones: dict[Path, str]) -> None:
        self.name = f"RAPL {' + '.join(zones.values())}"
        self._zones = tuple(zones)
        self._before: list[int | None] = []

    def _begin(self) -> None:
        self._before = [read_number(zone / "energy_uj") for zone in self._zones]

    def _end(self) -> float | None:
        total = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            after, size = read_number(zone / "energy_uj"), read_number(zone / "max_energy_range_uj")
            if before is None or after is None or (after < before and size is None):
                return None
            total += after - before if after >= before else after - before + (size or 0)
        return total / 1e6


class PowerMeter(EnergyMeter):
    """A sensor of power in watts, which another thread reads while something runs."""

    def __init__(self, name: str, watts: Callable[[], float | None]) -> None:
        self.name = name
        self._watts = watts

    def _begin(self) -> None:
        self._stop = threading.Event()
        self._readings: list[float | None] = [self._watts()]
        self._started = perf_counter()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._readings.append(self._watts())

    def _end(self) -> float | None:
        seconds = perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self._readings.append(self._watts())
        found = [watts for watts in self._readings if watts is not None]
        return statistics.mean(found) * seconds if len(found) == len(self._readings) else None


@dataclass(frozen=True)
class FoundMeter:
    """A sensor of energy, or why there is none."""

    meter: EnergyMeter | None
    reason: str


def find_energy_meter(sysfs: Path = Path("/sys"), ask: Vcgencmd = vcgencmd) -> FoundMeter:
    """RAPL, the power chip of a Raspberry Pi 5, or an INA2xx chip that measures the board."""
    zones = {}
    locked = None
    for zone in sorted((sysfs / "class/powercap").glob("intel-rapl:*")):
        kind = read_text(zone / "name")
        if kind.startswith("package") or kind == "dram":
            if read_number(zone / "energy_uj") is None:
                locked = zone / "energy_uj"
            else:
                zones[zone] = kind
    if locked is not None:
        return FoundMeter(None, f"{locked} may not be read; as root it may")
    if zones:
        return FoundMeter(RaplMeter(zones), "")
    if _pi_watts(ask) is not None:
        return FoundMeter(PowerMeter("Raspberry Pi PMIC", lambda: _pi_watts(ask)), "")
    chips = [
        chip
        for chip in sorted((sysfs / "class/hwmon").glob("hwmon*"))
        if read_text(chip / "name").startswith("ina2")
        and read_number(chip / "power1_input") is not None
    ]
    if len(chips) == 1:
        chip = chips[0]
        return FoundMeter(PowerMeter(read_text(chip / "name"), lambda: _hwmon_watts(chip)), "")
    if chips:
        return FoundMeter(None, f"{len(chips)} power sensors, none known to measure the whole")
    return FoundMeter(None, "no sensor of energy (RAPL, Raspberry Pi PMIC, INA2xx)")


def _pi_watts(ask: Vcgencmd) -> float | None:
    """Sum over the rails of a Raspberry Pi 5 for which current and voltage are known."""
    answer = ask("pmic_read_adc")
    amperes = dict(re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", answer))
    volts = dict(re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", answer))
    rails = amperes.keys() & volts.keys()
    return sum(float(amperes[r]) * float(volts[r]) for r in sorted(rails)) if rails else None


def _hwmon_watts(chip: Path) -> float | None:
    microwatts = read_number(chip / "power1_input")
    return None if microwatts is None else microwatts / 1e6


def cpu_celsius(sysfs: Path = Path("/sys")) -> float | None:
    """The hottest reading of the processor's own sensors in degrees Celsius."""
    found = []
    for chip in (sysfs / "class/hwmon").glob("hwmon*"):
        if read_text(chip / "name") in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
            found += [read_number(file) for file in chip.glob("temp*_input")]
    if not found:
        for zone in (sysfs / "class/thermal").glob("thermal_zone*"):
            if re.search("cpu|x86_pkg", read_text(zone / "type")):
                found.append(read_number(zone / "temp"))
    return max((milli / 1000 for milli in found if milli is not None), default=None)


@dataclass(frozen=True)
class Throttling:
    """How often the processor was slowed down since boot.

    Attributes:
        counts: by heat, summed over the CPUs (Intel's thermal_throttle); None without counters.
        pi: the bits of a Raspberry Pi's ``get_throttled``, None elsewhere.
    """

    counts: int | None
    pi: int | None

    @classmethod
    def read(cls, sysfs: Path = Path("/sys"), ask: Vcgencmd = vcgencmd) -> Throttling:
        """The state now."""
        files = (sysfs / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
        counts = [number for file in files if (number := read_number(file)) is not None]
        match = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", ask("get_throttled"))
        return cls(sum(counts) if counts else None, int(match[1], 16) if match else None)

    def since(self, before: Throttling) -> str:
        """What happened from ``before`` to this, in words; "n/a" where nothing is known."""
        parts = []
        if self.pi is not None:
            now = [text for bit, text in _PI_EVENTS.items() if self.pi >> (bit - 16) & 1]
            past = [text for bit, text in _PI_EVENTS.items() if self.pi >> bit & 1]
            parts += [f"now: {', '.join(now)}"] * bool(now)
            parts.append(f"since boot: {', '.join(past) or 'none'} (0x{self.pi:x})")
        if self.counts is not None:
            during = "n/a" if before.counts is None else f"{self.counts - before.counts:,}"
            parts.append(f"{during} events of heat during the run, {self.counts:,} since boot")
        return "; ".join(parts) or "n/a"


class PeakMemory:
    """The most memory this process has resident, mapped files included, from here on.

    Linux forgets earlier peaks on request; elsewhere the peak is that since the process began.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        try:
            # 5 resets VmHWM: proc_pid_clear_refs(5). Opened without O_CREAT.
            descriptor = os.open(proc / "clear_refs", os.O_WRONLY)
        except OSError:
            self.resets = False
            return
        try:
            self.resets = os.write(descriptor, b"5") == 1
        except OSError:
            self.resets = False
        finally:
            os.close(descriptor)

    def nbytes(self) -> int | None:
        """The peak so far, None where the system does not tell."""
        if self.resets and (match := re.search(r"VmHWM:\s*(\d+) kB", self._status())):
            return int(match[1]) * 1024
        try:
            import resource
        except ImportError:  # Windows
            return None
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    def _status(self) -> str:
        return read_text(self._proc / "status")
