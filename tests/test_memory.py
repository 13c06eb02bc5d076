"""What a process takes that runs the default model: the mapped file, the KV cache, little more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tmac_py import Model

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="pads allocations"),
]

MIB = 1 << 20
MOST_BESIDES = 64 * MIB
"""Of a process besides file and KV cache: interpreter, NumPy, vocabulary and scratch included."""

USUAL_BASE = 25 * MIB
"""Interpreter and NumPy of that: CPython 3.11, NumPy 2.4. What others take more is theirs."""

TOLERANCE = 0.01
"""Part of the file that may belong to one process: pages of its end, which others did not touch."""

ANSWER = """
import json, sys
import numpy

def peak():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))

base = peak()
from tmac_py import Model

path, n_prompt, kv = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with Model.load(path, threads=2) as model:
    ids = [100 + i * 7919 % 40000 for i in range(n_prompt)]
    result = model.generate(ids, max_tokens=32, temperature=0, kv=kv)
    print(json.dumps({"base": base, "peak": peak(), "answer": len(result.ids)}))
"""

WAIT = """
import sys
from tmac_py import Model

with Model.load(sys.argv[1], threads=1) as model:
    model.generate([1, 2, 3], max_tokens=2, temperature=0)
    print("ready", flush=True)
    sys.stdin.read()
"""


UNNEEDED = ("_hashlib", "asyncio", "jinja2", "numpy.random", "sentencepiece", "tqdm", "zipfile")
"""Modules that a plain answer does without: each takes time at every start, and some megabytes."""

IMPORTS = """
import sys
from tmac_py.cli import main

status = main.run([sys.argv[1], "--raw", "-p", "Hi", "-n", "2", "-q"])
print(*sorted({"numpy", *sys.argv[2:]} & sys.modules.keys()), file=sys.stderr)
sys.exit(status)
"""


def test_an_answer_imports_what_it_needs(default_lut: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, str(default_lut), *UNNEEDED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["numpy"]


@pytest.mark.parametrize(("n_prompt", "kv"), [(300, "f16"), (2000, "f16"), (2000, "int8")])
def test_peak_of_a_long_prompt(default_lut: Path, n_prompt: int, kv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(default_lut), str(n_prompt), kv],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["answer"] > 0
    with Model.load(default_lut, check=False) as model:
        cache = model.new_cache(n_prompt + 32, kv).nbytes
    file = default_lut.stat().st_size
    besides = MOST_BESIDES + max(0, found["base"] - USUAL_BASE)
    assert file + cache / 2 < found["peak"] <= file + cache + besides


def test_processes_share_the_weights(default_lut: Path) -> None:
    with ExitStack() as stack:
        pids = [stack.enter_context(waiting(default_lut)) for _ in range(2)]
        maps = [mapping(pid, default_lut) for pid in pids]
    file = default_lut.stat().st_size
    for found in maps:
        assert found["Rss"] >= (1 - TOLERANCE) * file  # checked, so all of it was read
        assert found["Anonymous"] == found["Private_Dirty"] == 0
        assert found["Private_Clean"] <= TOLERANCE * file
        assert found["Pss"] <= (0.5 + TOLERANCE) * file


@contextmanager
def waiting(path: Path) -> Iterator[int]:
    """Id of a process that has run the model at ``path`` and keeps it open."""
    command = [sys.executable, "-c", WAIT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def mapping(pid: int, path: Path) -> dict[str, int]:
    """Bytes of the process's map of ``path``, by the names in /proc/PID/smaps."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = line.endswith(f" {path}")
        elif inside and rest[-1] == "kB":
            key = name.removesuffix(":")
            sums[key] = sums.get(key, 0) + int(rest[0]) * 1024
    return sums
