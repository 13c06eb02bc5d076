"""Sensors and facts of the machine, on trees of files as Linux shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tmac_py import machine
from tmac_py.sensors import (
    PeakMemory,
    PowerMeter,
    RaplMeter,
    Throttling,
    cpu_celsius,
    find_energy_meter,
)

RAPL = "class/powercap/intel-rapl"
PI_ADC = """ 3V7_WL_SW_A current(0)=0.50000000A
   VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.00000000V
   VDD_CORE_V volt(15)=0.80000000V
    EXT5V_V volt(24)=5.10000000V"""


def make_tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def rapl(counter: int, *, size: int = 262143328850) -> dict[str, object]:
    return {
        f"{RAPL}/enabled": 1,
        f"{RAPL}:0/name": "package-0",
        f"{RAPL}:0/energy_uj": counter,
        f"{RAPL}:0/max_energy_range_uj": size,
        f"{RAPL}:0:0/name": "core",
        f"{RAPL}:0:0/energy_uj": 7,
        f"{RAPL}:0:1/name": "dram",
        f"{RAPL}:0:1/energy_uj": 1000,
        f"{RAPL}:0:1/max_energy_range_uj": 65712999613,
    }


def silent(_command: str) -> str:
    return ""


def test_rapl_counts_package_and_memory(tmp_path: Path) -> None:
    sysfs = make_tree(tmp_path, rapl(5_000_000))
    meter = find_energy_meter(sysfs, silent).meter
    assert isinstance(meter, RaplMeter)
    assert meter.name == "RAPL package-0 + dram"

    def run() -> None:
        make_tree(sysfs, {f"{RAPL}:0/energy_uj": 7_500_000, f"{RAPL}:0:1/energy_uj": 501_000})

    assert meter.joules(run, seconds=0) == pytest.approx(3.0)


def test_rapl_counters_wrap(tmp_path: Path) -> None:
    sysfs = make_tree(tmp_path, rapl(9_000_000, size=10_000_000))
    meter = find_energy_meter(sysfs, silent).meter
    assert meter is not None
    wrapped = {f"{RAPL}:0/energy_uj": 500_000}
    assert meter.joules(lambda: make_tree(sysfs, wrapped), seconds=0) == pytest.approx(1.5)
    (sysfs / f"{RAPL}:0/max_energy_range_uj").unlink()
    make_tree(sysfs, {f"{RAPL}:0/energy_uj": 9_000_000})
    assert meter.joules(lambda: make_tree(sysfs, wrapped), seconds=0) is None


def test_energy_is_a_mean_of_runs(tmp_path: Path) -> None:
    sysfs = make_tree(tmp_path, rapl(0))
    meter = find_energy_meter(sysfs, silent).meter
    assert meter is not None
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        make_tree(sysfs, {f"{RAPL}:0/energy_uj": runs * 2_000_000})

    assert meter.joules(run, seconds=0.02) == pytest.approx(2.0)
    assert runs > 1


def test_a_counter_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    sysfs = make_tree(tmp_path, rapl(0))
    (sysfs / f"{RAPL}:0/energy_uj").unlink()  # as unreadable as for users who are not root
    found = find_energy_meter(sysfs, silent)
    assert found.meter is None
    assert found.reason.endswith("intel-rapl:0/energy_uj may not be read; as root it may")


def test_no_sensor_is_no_energy(tmp_path: Path) -> None:
    found = find_energy_meter(tmp_path, silent)
    assert found.meter is None
    assert found.reason.startswith("no sensor of energy")


def test_a_pi_sums_its_rails(tmp_path: Path) -> None:
    found = find_energy_meter(tmp_path, {"pmic_read_adc": PI_ADC}.__getitem__)
    assert isinstance(found.meter, PowerMeter)
    assert found.meter.name == "Raspberry Pi PMIC"
    found.meter._begin()
    joules = found.meter._end()
    assert joules is not None
    seconds = joules / (0.5 * 3.0 + 2.0 * 0.8)
    assert 0 < seconds < 60


def test_power_of_a_board_by_hwmon(tmp_path: Path) -> None:
    ina = {"class/hwmon/hwmon2/name": "ina226", "class/hwmon/hwmon2/power1_input": 4_500_000}
    gpu = {"class/hwmon/hwmon0/name": "amdgpu", "class/hwmon/hwmon0/power1_input": 9_000_000}
    meter = find_energy_meter(make_tree(tmp_path, {**ina, **gpu}), silent).meter
    assert isinstance(meter, PowerMeter)
    assert (meter.name, meter._watts()) == ("ina226", 4.5)
    (tmp_path / "class/hwmon/hwmon2/power1_input").unlink()
    assert meter.joules(lambda: None, seconds=0) is None
    second = {k.replace("hwmon2", "hwmon3"): v for k, v in ina.items()}
    assert find_energy_meter(make_tree(tmp_path, {**ina, **second}), silent).meter is None


def test_temperature_is_that_of_the_processor(tmp_path: Path) -> None:
    assert cpu_celsius(tmp_path) is None
    zones = {"type": "acpitz", "temp": 90_000}
    make_tree(tmp_path, {f"class/thermal/thermal_zone0/{k}": v for k, v in zones.items()})
    assert cpu_celsius(tmp_path) is None
    zones = {"type": "cpu-thermal", "temp": 61_200}
    make_tree(tmp_path, {f"class/thermal/thermal_zone1/{k}": v for k, v in zones.items()})
    assert cpu_celsius(tmp_path) == 61.2
    chip = {"name": "k10temp", "temp1_input": 70_500, "temp3_input": 66_000}
    make_tree(tmp_path, {f"class/hwmon/hwmon1/{k}": v for k, v in chip.items()})
    assert cpu_celsius(tmp_path) == 70.5


def test_throttling_by_counters(tmp_path: Path) -> None:
    folder = "devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    names = [folder.format(cpu, kind) for cpu in (0, 1) for kind in ("core", "package")]
    before = Throttling.read(make_tree(tmp_path, dict.fromkeys(names, 3)), silent)
    after = Throttling.read(make_tree(tmp_path, {names[0]: 8}), silent)
    assert after.since(before) == "5 events of heat during the run, 17 since boot"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("throttled=0x0", "since boot: none (0x0)"),
        (
            "throttled=0x50005",
            "now: under-voltage, throttling; since boot: under-voltage, throttling (0x50005)",
        ),
        ("throttled=0x20000", "since boot: capped frequency (0x20000)"),
        ("", "n/a"),
    ],
)
def test_throttling_of_a_pi(tmp_path: Path, answer: str, text: str) -> None:
    state = Throttling.read(tmp_path, {"get_throttled": answer}.__getitem__)
    assert state.since(state) == text


def test_board_clock_and_power(tmp_path: Path) -> None:
    assert machine.board_name(tmp_path, tmp_path) is None
    assert machine.governors({0, 1}, tmp_path) == []
    assert machine.clock_hertz({0, 1}, tmp_path) is None
    assert machine.power_source(tmp_path) is None
    make_tree(
        tmp_path,
        {
            "class/dmi/id/sys_vendor": "LENOVO",
            "class/dmi/id/product_name": "21CB",
            "class/dmi/id/product_version": "ThinkPad X1",
            **{f"devices/system/cpu/cpu{n}/cpufreq/scaling_governor": "powersave" for n in (0, 1)},
            "devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 4_700_000,
            "devices/system/cpu/cpu1/cpufreq/scaling_max_freq": 3_500_000,
            "class/power_supply/AC/online": 1,
            "class/power_supply/mouse/status": "Discharging",
            "class/power_supply/mouse/scope": "Device",
        },
    )
    assert machine.board_name(tmp_path, tmp_path) == "LENOVO 21CB ThinkPad X1"
    assert machine.governors({0, 1}, tmp_path) == ["powersave"]
    assert machine.clock_hertz({0, 1}, tmp_path) == 4.7e9
    assert machine.power_source(tmp_path) == "mains"
    make_tree(tmp_path, {"class/power_supply/BAT0/status": "Discharging"})
    assert machine.power_source(tmp_path) == "battery"
    model = tmp_path / "device-tree/model"
    model.parent.mkdir()
    model.write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert machine.board_name(tmp_path, tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"


def test_peak_memory_forgets_what_was_before() -> None:
    early = PeakMemory()
    block = bytearray(b"x" * (64 << 20))
    high = early.nbytes()
    del block
    late = PeakMemory()
    low = late.nbytes()
    if high is None or low is None:
        pytest.skip("this system does not tell how much memory a process has")
    if late.resets:
        assert low <= high - (48 << 20)
    else:
        assert low >= high


def test_peak_memory_without_clear_refs(tmp_path: Path) -> None:
    memory = PeakMemory(make_tree(tmp_path, {"status": "VmHWM:\t 8 kB"}))
    assert not memory.resets
    assert memory.nbytes() != 8192
    memory = PeakMemory(make_tree(tmp_path, {"clear_refs": ""}))
    assert (memory.resets, memory.nbytes()) == (True, 8192)
