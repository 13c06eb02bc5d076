"""Fixtures of the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import tiny_model as tiny
from serving import N_CTX, openai_client, running
from tmac_py.model import Model


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny.lut"
    return tiny.write_tiny_model(
        path, max_position_embeddings=N_CTX, special=("embed",), quantize=tiny.flat_head
    )


@pytest.fixture(scope="module")
def port(lut: Path) -> Iterator[int]:
    with running(lut, "--alias", "tiny") as (_, port):
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai_client(port) as client:
        yield client


@pytest.fixture(scope="module")
def model(lut: Path) -> Iterator[Model]:
    with Model.load(lut, threads=1) as model:
        yield model
