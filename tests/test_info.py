"""tmac info and tmac inspect: machines of several kinds, and what the reports say."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tiny_lut import CONFIG, Q_PROJ, write
from tiny_model import binary, write_tiny_model
from tmac_py import machine
from tmac_py.cli import info, inspect
from tmac_py.cli.tables import format_bytes, format_table
from tmac_py.errors import ModelFileError


def make_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def cpu_tree(siblings: Mapping[int, str], **extra: str) -> dict[str, str]:
    folder = "devices/system/cpu"
    tree = {f"{folder}/cpu{n}/topology/core_cpus_list": s for n, s in siblings.items()}
    return {**tree, **{name.replace("__", "/"): text for name, text in extra.items()}}


HYPERTHREADS = cpu_tree(
    {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
)
HYBRID = {
    **cpu_tree({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5", 6: "6", 7: "7"}),
    "devices/cpu_core/cpus": "0-3",
    "devices/cpu_atom/cpus": "4-7",
}
BIG_LITTLE = {
    **cpu_tree({n: str(n) for n in range(8)}),
    **{
        f"devices/system/cpu/cpu{n}/cpu_capacity": str(capacity)
        for n, capacity in enumerate([250, 250, 250, 250, 870, 870, 870, 1024])
    },
}


@pytest.mark.parametrize(
    ("tree", "cpus", "cores"),
    [
        (HYPERTHREADS, range(8), 4),
        (HYPERTHREADS, [0, 4], 1),
        (HYPERTHREADS, [4, 5], 2),
        (HYBRID, range(8), 2),
        (HYBRID, [1, 4, 5], 1),
        (HYBRID, [4, 5, 6], 3),
        (BIG_LITTLE, range(8), 4),
        (BIG_LITTLE, [0, 1], 2),
        ({}, range(3), 3),
    ],
)
def test_physical_cores(tmp_path: Path, tree: dict[str, str], cpus: Any, cores: int) -> None:
    make_tree(tmp_path, tree)
    assert machine.physical_cores(set(cpus), tmp_path) == cores


def version_2(root: Path, group: str, mounted: str = "/") -> dict[str, str]:
    return {
        "self/cgroup": f"0::{group}",
        "self/mountinfo": f"30 29 0:26 {mounted} {root}/fs rw - cgroup2 cgroup2 rw,nsdelegate",
    }


def version_1(root: Path, group: str, mounted: str = "/") -> dict[str, str]:
    return {
        "self/cgroup": f"5:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:/",
        "self/mountinfo": f"36 25 0:31 {mounted} {root}/fs rw shared:15 - cgroup c rw,cpu,cpuacct\n"
        f"37 25 0:32 {mounted} {root}/fs rw shared:16 - cgroup c rw,memory",
    }


@pytest.mark.parametrize(
    ("version", "group", "mounted", "files", "quota"),
    [
        (version_2, "/a/b", "/", {"a/b/cpu.max": "max 100000"}, None),
        (version_2, "/a/b", "/", {"a/b/cpu.max": "150000 100000"}, 1.5),
        (version_2, "/a/b", "/", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        (version_2, "/", "/", {"cpu.max": "50000 100000"}, 0.5),
        (version_2, "/x/pod", "/x/pod", {"cpu.max": "200000 100000"}, 2.0),
        (version_2, "/gone", "/", {}, None),
        (version_1, "/a", "/", {"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "1000"}, None),
        (version_1, "/a", "/", {"a/cpu.cfs_quota_us": "4000", "a/cpu.cfs_period_us": "1000"}, 4.0),
        (version_1, "/d/1", "/d/1", {"cpu.cfs_quota_us": "500", "cpu.cfs_period_us": "250"}, 2.0),
    ],
)
def test_cpu_quota(
    tmp_path: Path, version: Any, group: str, mounted: str, files: dict[str, str], quota: Any
) -> None:
    make_tree(tmp_path, version(tmp_path, group, mounted))
    make_tree(tmp_path / "fs", files)
    assert machine.cpu_quota(tmp_path / "self") == quota


def test_no_control_groups_means_no_quota(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "quota", "threads"), [(8, None, 8), (8, 2.5, 2), (8, 0.2, 1), (2, 16.0, 2)]
)
def test_default_threads(
    monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: cores)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.default_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_default_threads_follow_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.default_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("version", [version_1, version_2])
def test_memory_honours_the_control_group(tmp_path: Path, version: Any) -> None:
    make_tree(tmp_path, {"meminfo": "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB"})
    assert machine.memory_bytes(tmp_path) == (8000 * 1024, 6000 * 1024)
    make_tree(tmp_path, version(tmp_path, "/a"))
    names = {
        version_1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        version_2: ("memory.max", "memory.current"),
    }[version]
    make_tree(tmp_path / "fs/a", dict(zip(names, ("4000000", "1000000"), strict=True)))
    assert machine.memory_bytes(tmp_path) == (4000000, 3000000)
    assert machine.memory_bytes(tmp_path / "fs") == (None, None)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD  Ryzen 9\nflags\t: a b", "AMD Ryzen 9"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n", "Cortex-A76"),
        ("CPU implementer\t: 0x61\nCPU part\t: 0x022\n", "implementer 0x61, part 0x022"),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert machine.cpu_name(path) == name
    assert machine.cpu_name(tmp_path / "missing")


def run(module: Any, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.execute(parser.parse_args(argv)))


def test_info_report(capsys: pytest.CaptureFixture[str]) -> None:
    core = pytest.importorskip("tmac_py._core")
    assert run(info) == 0
    text = capsys.readouterr().out
    for isa in core.isas():
        line = re.search(rf"^{isa['name']} .*$", text, flags=re.MULTILINE)
        assert line is not None
        assert isa["reason"] in line[0]
    assert f"{machine.default_threads()} by default" in text
    assert "smollm2-135m" in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    core = pytest.importorskip("tmac_py._core")
    assert run(info, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["isas"] == core.isas()
    assert [isa["name"] for isa in values["isas"] if isa["active"]] == [core.active_isa()]
    assert values["default_threads"] == machine.default_threads()
    assert values["version"] == core.__version__


def test_inspect_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.lut"
    write(path)
    assert run(inspect, str(path)) == 0
    text = capsys.readouterr().out
    assert "verified" in text
    assert re.search(r"self_attn.q_proj +2 +24 x 24 +3 +16 +offset", text)
    assert Q_PROJ not in text
    assert run(inspect, str(path), "--tensors", "--no-check") == 0
    text = capsys.readouterr().out
    assert "not checked" in text
    assert Q_PROJ in text


def test_inspect_names_ternary_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_model(tmp_path / "model.lut", special=("q_proj",))
    assert run(inspect, str(path), "--tensors") == 0
    text = capsys.readouterr().out
    assert re.search(r"self_attn.q_proj +2 +128 x 64 +ternary +64 +none +1\.812", text)
    assert re.search(r"layers.1.self_attn.q_proj.weight +128 x 64 +ternary +64 ", text)
    assert re.search(r"layers.1.self_attn.k_proj.weight +64 x 64 +4 +32 ", text)


def test_inspect_names_binary_coded_matrices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_model(
        tmp_path / "model.lut", special=("q_proj",), quantize=partial(binary, bits=3)
    )
    assert run(inspect, str(path), "--tensors") == 0
    text = capsys.readouterr().out
    assert re.search(r"self_attn.q_proj +2 +128 x 64 +3 bcq +32 +offset +5\.000", text)
    assert re.search(r"layers.1.self_attn.q_proj.weight +128 x 64 +3 bcq +32 ", text)
    assert re.search(r"layers.1.self_attn.k_proj.weight +64 x 64 +4 +32 ", text)


def test_inspect_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.lut"
    tensors = write(path)
    assert run(inspect, str(path), "--json", "--tensors") == 0
    values = json.loads(capsys.readouterr().out)
    matrices = {name: v for name, v in tensors.items() if v.ndim == 1 and v.dtype == "uint8"}
    packed = sum(values_.nbytes for values_ in matrices.values())
    shapes = CONFIG.tensor_shapes()
    weights = sum(shapes[name][0] * shapes[name][1] for name in matrices)
    assert values["packed_bytes"] == packed
    assert values["bits_per_weight"] == pytest.approx(8 * packed / weights)
    assert values["parameters"] == weights + 5 * 24
    assert values["file_bytes"] == path.stat().st_size
    assert values["config"] == CONFIG.to_dict()
    assert sum(item["count"] for item in values["matrices"]) == len(matrices)
    assert [item["name"] for item in values["tensors"]][: len(matrices)] == list(matrices)


def test_inspect_refuses_a_damaged_file_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "model.lut"
    write(path)
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ModelFileError, match="tokenizer/z does not match its checksum"):
        run(inspect, str(path))
    assert run(inspect, str(path), "--no-check") == 0


def test_tables_align() -> None:
    rows = [("a", "10"), ("bcd", "7")]
    assert format_table(rows, right="lr") == "  a    10\n  bcd   7"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (98_362_432, "98.4 MB"), (999_999, "1 MB")],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text
