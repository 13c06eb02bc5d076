"""Repositories of the Hugging Face hub as sources: from a server of our own, and from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import COMMIT, serving, write_cache
from tiny_checkpoints import (
    TINY,
    gguf_tensors,
    hf_config,
    random_weights,
    write_gguf,
    write_hf,
    write_speaking,
)
from tmac_py.converters import convert
from tmac_py.converters.hub import HubId, parse_id
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile

REPOSITORY = "someone/tiny-1.0"


Done = subprocess.CompletedProcess[str]


def run(cache: Path, source: str, out: Path, **environment: str) -> Done:
    """tmac-convert in a process of its own: huggingface_hub reads its settings once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "tmac_py", "convert", source, str(out), "--force"],
        env={**kept, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", **environment},
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def offline(cache: Path, source: str, out: Path) -> Done:
    return run(cache, source, out, HF_HUB_OFFLINE="1")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_speaking(tmp_path_factory.mktemp("hf"))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, TINY, gguf_tensors(random_weights(TINY), TINY, "Q4_0")).read_bytes()


def assert_same_weights(out: Path, source: Path) -> None:
    """All but the name of the source."""
    convert(source, out.with_suffix(".own"))
    with LutFile.open(out) as ours, LutFile.open(out.with_suffix(".own")) as own:
        assert ours.config == own.config
        assert {n: t.xxh3 for n, t in ours.tensors.items()} == {
            n: t.xxh3 for n, t in own.tensors.items()
        }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("hf://org/name", HubId("org/name")),
        ("org/na.me-1_x@v1.0", HubId("org/na.me-1_x", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name:Q4_K_M", HubId("org/name", None, "Q4_K_M")),
        ("hf://org/name@main:a/b.gguf", HubId("org/name", "main", "a/b.gguf")),
        ("name", None),
        ("./name/x", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("models/m.gguf", None),
        ("models/m.safetensors", None),
        ("models/m.bin", None),
    ],
)
def test_names(text: str, expected: HubId | None) -> None:
    assert parse_id(text) == expected


def test_a_malformed_name_is_refused() -> None:
    for text in ("hf://", "hf://name", "hf://a/b/c", "hf://a/b@"):
        with pytest.raises(ModelFileError, match="must be hf://ORG/NAME"):
            parse_id(text)


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_is_needed_is_fetched(folder: Path, tmp_path: Path, shards: int) -> None:
    source = folder
    if shards > 1:
        source = write_hf(
            tmp_path / "sharded", random_weights(TINY), hf_config(TINY), shards=shards
        )
    files = contents(source)
    more = {
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"twice",
        "onnx/config.json": b"{}",
    }
    with serving(REPOSITORY, {**files, **more}) as (address, sent):
        done = run(tmp_path / "cache", REPOSITORY, tmp_path / "m.lut", HF_ENDPOINT=address)
        assert (done.returncode, done.stdout) == (0, "")
        assert sorted(sent) == sorted(files)
        again = run(
            tmp_path / "cache", f"hf://{REPOSITORY}@main", tmp_path / "n.lut", HF_ENDPOINT=address
        )
        assert again.returncode == 0
        assert len(sent) == len(files)
    assert_same_weights(tmp_path / "m.lut", source)
    with LutFile.open(tmp_path / "m.lut") as file:
        assert file.source["file"] == f"{REPOSITORY}@{COMMIT}"
    without = offline(tmp_path / "cache", REPOSITORY, tmp_path / "o.lut")
    assert without.returncode == 0, without.stderr
    assert (tmp_path / "o.lut").read_bytes() == (tmp_path / "m.lut").read_bytes()


def test_one_of_several_gguf_files(gguf_file: bytes, tmp_path: Path) -> None:
    names = ["tiny-Q4_0.gguf", "tiny-q8_0.gguf", "big/tiny-Q4_0_4_4.gguf"]
    with serving(REPOSITORY, {**dict.fromkeys(names, gguf_file), "config.json": b"{}"}) as (
        address,
        sent,
    ):
        for choice, name in (("Q4_0", names[0]), ("Q8_0", names[1]), (names[2], names[2])):
            out, cache = tmp_path / "m.lut", tmp_path / name.replace("/", "-")
            done = run(cache, f"{REPOSITORY}:{choice}", out, HF_ENDPOINT=address)
            assert done.returncode == 0, done.stderr
            assert sent == [name]
            sent.clear()
        for source, text in (
            (
                REPOSITORY,
                f"has 3 GGUF files, choose one as in {REPOSITORY}:Q4_K_M; {sorted(names)[0]}",
            ),
            (f"{REPOSITORY}:tiny", "'tiny' is 3 of them"),
            (f"{REPOSITORY}:Q2_K", "'Q2_K' is 0 of them"),
        ):
            done = run(tmp_path / "cache", source, tmp_path / "n.lut", HF_ENDPOINT=address)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert text in done.stderr
        assert sent == []
    (tmp_path / "m.gguf").write_bytes(gguf_file)
    assert_same_weights(out, tmp_path / "m.gguf")


def test_the_cache_is_enough(folder: Path, gguf_file: bytes, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", REPOSITORY, contents(folder))
    write_cache(tmp_path / "cache", "someone/tiny-GGUF", {"tiny.Q4_0.gguf": gguf_file})
    for source in (REPOSITORY, f"{REPOSITORY}@{COMMIT}", "someone/tiny-GGUF"):
        done = offline(tmp_path / "cache", source, tmp_path / "m.lut")
        assert done.returncode == 0, done.stderr
        LutFile.open(tmp_path / "m.lut").close()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pytorch_model.bin is a pickle"),
        ({"README.md": b""}, "has neither config.json and safetensors nor GGUF files"),
        ({"config.json": b"{}", "model.safetensors": b""}, "model_type None is not supported"),
    ],
)
def test_repositories_that_cannot_be_read(
    tmp_path: Path, files: dict[str, bytes], text: str
) -> None:
    write_cache(tmp_path / "cache", REPOSITORY, files)
    done = offline(tmp_path / "cache", REPOSITORY, tmp_path / "m.lut")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert text in done.stderr
    assert not (tmp_path / "m.lut").exists()


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    without = offline(tmp_path / "cache", REPOSITORY, tmp_path / "m.lut")
    with serving("another/repository", {}) as (address, _):
        unknown = run(tmp_path / "cache", REPOSITORY, tmp_path / "m.lut", HF_ENDPOINT=address)
    for done in (without, unknown):
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{REPOSITORY}: no such file or folder, and not to be had from" in done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_a_path_wins(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / REPOSITORY
    own.parent.mkdir()
    own.symlink_to(folder)
    (tmp_path / "cache").mkdir()
    done = offline(tmp_path / "cache", REPOSITORY, tmp_path / "m.lut")
    assert done.returncode == 0, done.stderr
    with LutFile.open(tmp_path / "m.lut") as file:
        assert file.source["file"] == folder.name
