"""The same tokens on every kernel, and on a CPU without AVX; what an import costs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tmac_py
from tiny_model import write_tiny_model
from tmac_py import Model, _core

ANSWER = """
import sys
from tmac_py import Model, _core
with Model.load(sys.argv[1], threads=2) as model:
    print(*[row["name"] for row in _core.isas() if row["usable"]])
    answer = model.stream("abc", max_tokens=24, seed=3, logit_bias={2: -99.0})
    print(*[token.id for token in answer])
"""
EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
OLD_CPU = "Nehalem"
"""x86-64 with SSE4.2 and without AVX: what NumPy's wheels need at least."""

TOO_MUCH = ("gguf", "huggingface_hub", "jinja2", "sentencepiece", "shtab", "tokenizers", "torch")
"""Modules that are imported when they are needed."""


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("wheel") / "model.lut", bits=3, tie_word_embeddings=False
    )


@pytest.fixture
def best_isa() -> Iterator[None]:
    before = _core.active_isa()
    yield
    _core.use_isa(before)


def run(*command: str) -> list[str]:
    """Lines that a Python program with this package prints."""
    package = Path(tmac_py.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("TMAC_ISA", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def tokens(lut: Path) -> list[int]:
    with Model.load(lut, threads=2) as model:
        answer = model.stream("abc", max_tokens=24, seed=3, logit_bias={2: -99.0})
        return [token.id for token in answer]


@pytest.mark.usefixtures("best_isa")
def test_every_kernel_of_this_machine_says_the_same(lut: Path) -> None:
    isas = [row["name"] for row in _core.isas() if row["usable"]]
    assert "scalar" in isas
    said = {}
    for isa in isas:
        _core.use_isa(isa)
        said[isa] = tokens(lut)
    assert len(said["scalar"]) == 24
    assert len(set(said["scalar"])) > 3  # not one token over and over
    assert all(ids == said["scalar"] for ids in said.values())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")
@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 (qemu-user) is not installed")
def test_a_cpu_without_avx_says_the_same(lut: Path) -> None:
    assert EMULATOR is not None
    isas, ids = run(EMULATOR, "-cpu", OLD_CPU, sys.executable, "-c", ANSWER, str(lut))
    assert isas == "scalar"
    assert [int(i) for i in ids.split()] == tokens(lut)


def test_an_import_brings_what_it_needs() -> None:
    code = "import sys\n{}\nprint(*sorted(sys.modules))"
    (loaded,) = run(sys.executable, "-c", code.format("import tmac_py"))
    assert "numpy" not in loaded.split()
    (loaded,) = run(sys.executable, "-c", code.format("from tmac_py import Model"))
    assert "tmac_py._core" in loaded.split()
    assert not set(loaded.split()) & set(TOO_MUCH)
