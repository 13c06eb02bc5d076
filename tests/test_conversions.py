"""Checkpoints in place of a .lut: converted once into the cache, found again, replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_server import COMMIT, serving, write_cache
from tiny_checkpoints import TINY, gguf_tensors, random_weights, write_gguf, write_speaking
from tmac_py import conversions
from tmac_py.cli import main as cli
from tmac_py.conversions import ensure_converted, ensure_from_hub
from tmac_py.converters import convert
from tmac_py.converters.hub import HubId
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile

REPOSITORY = "someone/tiny-1.0"
ASK = ("-p", "the cat", "-n", "4", "--temp", "0", "--raw", "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_0")
    return write_gguf(tmp_path / "m.gguf", TINY, tensors)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("TMAC_CACHE", str(path))
    return path


def luts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.lut"))


def test_what_is_converted_is_what_tmac_convert_makes(
    folder: Path, gguf_file: Path, cache: Path, tmp_path: Path
) -> None:
    phases: list[str] = []
    for source in (folder, gguf_file):
        path = ensure_converted(source, progress=lambda phase, *_: phases.append(phase))
        convert(source, tmp_path / "own.lut")
        assert path.read_bytes() == (tmp_path / "own.lut").read_bytes()
        assert path.name.startswith(f"{source.stem}-")
    assert set(phases) == {"convert"}
    assert len(luts(cache)) == 2
    assert not list(cache.glob("*.partial-*"))


def test_it_is_done_once_and_again_after_a_change(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_converted(gguf_file)
    link = gguf_file.with_name("link.gguf")
    link.symlink_to(gguf_file)
    with monkeypatch.context() as patch:
        patch.setattr(conversions, "_convert", None)
        assert ensure_converted(gguf_file) == ensure_converted(link) == first
    os.utime(gguf_file, ns=(1, 1))
    second = ensure_converted(gguf_file)
    assert second != first
    assert luts(cache) == [second]
    monkeypatch.setattr(conversions, "RECIPE", 99)
    third = ensure_converted(gguf_file)
    assert luts(cache) == sorted([second, third])  # another version may still use its own


@pytest.mark.usefixtures("cache")
def test_a_conversion_that_fails_leaves_nothing(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        out = arguments[3]
        assert isinstance(out, Path)
        out.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversions, "_convert", stop)
        with pytest.raises(KeyboardInterrupt):
            ensure_converted(gguf_file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    with gguf_file.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ModelFileError, match=str(gguf_file)):
        ensure_converted(gguf_file)
    with pytest.raises(UnsupportedError, match="a folder without config"):
        ensure_converted(cache)
    assert luts(cache) == []


def test_two_processes_share_one_conversion(folder: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tmac_py.conversions import ensure_converted;"
        "print(ensure_converted(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {child.communicate(timeout=120)[0].strip() for child in children}
    assert paths == {str(path) for path in luts(cache)}
    assert len(paths) == 1


def run(
    capsys: pytest.CaptureFixture[str], *argv: str, program: Callable[..., int] = cli.run
) -> tuple[int, str, str]:
    status = program(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_every_kind_of_model_on_the_command_line(
    folder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(folder, tmp_path / "own.lut")
    expected = run(capsys, str(tmp_path / "own.lut"), *ASK)
    assert expected[0] == 0
    assert run(capsys, str(folder), *ASK) == expected
    status, out, err = run(capsys, "-m", str(folder), *ASK[:-1])
    assert (status, out) == expected[:2]
    assert "Converting" not in err  # it has been
    measure = ("-p", "8", "-n", "0", "-r", "1", "-t", "1", "-o", "csv")
    status, out, _ = run(capsys, "-m", str(folder), *measure, program=cli.bench)
    assert status == 0
    assert "pp8" in out
    assert len(luts(cache)) == 1


def in_a_process(
    cache: Path, hub: Path, *argv: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """tmac-run in a process of its own: huggingface_hub reads its settings once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"TMAC_CACHE": str(cache), "HF_HUB_CACHE": str(hub), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tmac_py", "run", *argv, *ASK],
        env={**kept, **own, **environment},
        cwd=hub.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_name_on_the_hub(folder: Path, cache: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub = tmp_path / "hub"
    hub.mkdir()
    with serving(REPOSITORY, files) as (address, sent):
        first = in_a_process(cache, hub, REPOSITORY, HF_ENDPOINT=address)
        assert first.returncode == 0, first.stderr
        assert sorted(sent) == sorted(files)
        again = in_a_process(cache, hub, REPOSITORY, HF_ENDPOINT=address)
        assert (again.returncode, again.stdout) == (0, first.stdout)
        assert len(sent) == len(files)
        (path,) = luts(cache)
        with LutFile.open(path) as file:
            assert file.source["file"] == f"{REPOSITORY}@{COMMIT}"
        for options in (["--offline"], []):
            nowhere = tmp_path / "empty"
            nowhere.mkdir(exist_ok=True)
            without = in_a_process(
                cache, nowhere, REPOSITORY, *options, HF_ENDPOINT="http://[::1]:1"
            )
            assert (without.returncode, without.stdout) == (0, first.stdout), without.stderr
    unknown = in_a_process(cache, hub, "someone/else", "--offline")
    assert unknown.returncode == 2
    assert "someone/else: no such file or folder, and not to be had from" in unknown.stderr
    assert "downloads are switched off" in unknown.stderr
    typing_error = in_a_process(cache, hub, "models/mine.lut", "--offline")
    assert "models/mine.lut: no such file; models with a name" in typing_error.stderr


def test_the_hubs_own_cache_is_enough_offline(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_cache(tmp_path / "hub", REPOSITORY, files)
    done = in_a_process(cache, tmp_path / "hub", REPOSITORY, "--offline")
    assert done.returncode == 0, done.stderr
    (path,) = luts(cache)
    monkeypatch.setattr(conversions, "_convert", None)
    monkeypatch.setattr(
        "tmac_py.converters.hub.locate", lambda *_, **__: (_ for _ in ()).throw(ModelFileError(""))
    )
    assert ensure_from_hub(HubId(REPOSITORY), offline=True) == path
    with pytest.raises(ModelFileError):
        ensure_from_hub(HubId(REPOSITORY, "v2"), offline=True)
