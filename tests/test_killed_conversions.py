"""Conversions that are ended at any moment: a whole file or none."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiny_checkpoints import TINY, hf_config, random_weights, write_hf
from tmac_py.converters import convert
from tmac_py.lutwriter import LutWriter

MOMENTS = 3
"""Of each signal, spread over a conversion."""

LARGER = replace(TINY, intermediate_size=1024, num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    return write_hf(path, random_weights(LARGER), hf_config(LARGER), dtype="F16")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "m.lut"
    convert(folder, out)
    return out.read_bytes()


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """A conversion that has begun to write. A process in the background starts without SIGINT."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tmac_py.cli.main import convert; sys.exit(convert())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(out), "--force"], stderr=subprocess.PIPE
    )
    wait_for(lambda: temporaries(out) or process.poll() is not None)
    return process


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def temporaries(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def seconds(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """From the first byte to the end."""
    process = start(folder, tmp_path_factory.mktemp("timed") / "m.lut")
    began = time.monotonic()
    assert process.wait(120) == 0
    assert process.stderr is not None
    process.stderr.close()
    return time.monotonic() - began


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_whole_file_or_none(
    folder: Path,
    whole: bytes,
    seconds: float,
    tmp_path: Path,
    number: signal.Signals,
    moment: int,
) -> None:
    out = tmp_path / "m.lut"
    existing = moment % 2 == 1
    if existing:
        out.write_bytes(b"before")
    process = start(folder, out)
    time.sleep(seconds * (moment + np.random.default_rng([moment, number]).random()) / MOMENTS)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error
    if process.returncode == 0:
        assert out.read_bytes() == whole
    else:
        assert process.returncode in (128 + number, -number)
        if out.exists():
            assert out.read_bytes() in (whole, b"before")
        if process.returncode == -number != -signal.SIGKILL:  # it was on its way out already
            assert out.read_bytes() == whole
        assert out.exists() >= existing
    if number != signal.SIGKILL:
        assert temporaries(out) == []
    for left in temporaries(out):
        assert left.suffix == ".tmp"
    convert(folder, out)
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


def test_files_that_are_being_written_stay(folder: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "m.lut"
    with suppress(KeyboardInterrupt), LutWriter(out, config=LARGER, tokenizer={}, source={}):
        others = temporaries(out)
        assert len(others) == 1
        (tmp_path / ".m.lut.0123456789ab.tmp").write_bytes(whole)
        another = tmp_path / ".n.lut.0123456789ab.tmp"
        another.write_bytes(b"")
        convert(folder, out)
        assert sorted(temporaries(out)) == sorted([*others, another])
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == sorted([out, another])
    assert out.read_bytes() == whole
