"""Models by name: pip against a folder of wheels, wrong content, interruptions, no network."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_checkpoints import TINY, gguf_tensors, random_weights, write_gguf
from tiny_lut import write
from tmac_py import default_model
from tmac_py.default_model import DEFAULT_MODELS, PackagedModel, cached_path, ensure_model
from tmac_py.errors import DownloadError
from tmac_py.lutfile import LutFile

NAME = "tiny"
CHECKPOINT = b"GGUF" + bytes(range(256)) * 400
MEMBER = "tmac_tiny/tiny.gguf"
WHEEL = "tmac_tiny-1.0-py3-none-any.whl"
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and scripts")

CONVERT = default_model._convert

Interpreter = Callable[[str], None]


def make_wheel(folder: Path, checkpoint: bytes = CHECKPOINT) -> PackagedModel:
    """Write a wheel that pip accepts; returns the pins that describe it."""
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, checkpoint)
        archive.writestr(
            "tmac_tiny-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tmac-tiny\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(
            "tmac_tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tmac_tiny-1.0.dist-info/RECORD", "")
    return pins_of(path, checkpoint)


def pins_of(path: Path, checkpoint: bytes = CHECKPOINT) -> PackagedModel:
    """The pins of a wheel with this checkpoint."""
    return PackagedModel(
        package="tmac-tiny",
        version="1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=MEMBER,
        member_bytes=len(checkpoint),
        member_sha256=hashlib.sha256(checkpoint).hexdigest(),
        model="tests/tiny",
        license="Apache-2.0",
    )


def fake_convert(
    model: PackagedModel, gguf: Path, out: Path, report: default_model.Progress
) -> None:
    assert gguf.read_bytes() == CHECKPOINT
    assert model.source["license"] == "Apache-2.0"
    report("convert", 0, 10)
    write(out)
    report("convert", 10, 10)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only index, with the model "tiny" in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("TMAC_OFFLINE", raising=False)
    monkeypatch.setitem(DEFAULT_MODELS, NAME, make_wheel(folder))
    monkeypatch.setattr(default_model, "_convert", fake_convert)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Interpreter:
    """Put a shell script in the place of the Python that runs pip."""
    assert "index" in request.fixturenames

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(cache: Path, *, offline: bool = False) -> str:
    """The error's text; nothing but the lock may be left."""
    with pytest.raises(DownloadError) as caught:
        ensure_model(NAME, cache_dir=cache, offline=offline)
    assert not cache.exists() or listing(cache) == [f"{NAME}.lock"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("index")
def test_downloads_converts_and_keeps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    path = ensure_model(NAME, cache_dir=cache, progress=lambda *call: calls.append(call))
    assert path == cached_path(NAME, cache)
    LutFile.open(path).close()
    assert listing(cache) == [path.name, f"{NAME}.lock"]
    phases = list(dict.fromkeys(phase for phase, _, _ in calls))
    assert phases == ["download", "check", "unpack", "convert"]
    for phase in phases:
        assert [done for name, done, total in calls if name == phase and done == total]
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # no pip needed any more
    assert ensure_model(NAME, cache_dir=cache) == path
    assert ensure_model(NAME, cache_dir=cache, offline=True) == path


@pytest.mark.usefixtures("index")
def test_a_broken_cached_file_is_replaced(cache: Path) -> None:
    path = ensure_model(NAME, cache_dir=cache)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert ensure_model(NAME, cache_dir=cache) == path
    assert path.read_bytes() == whole


@pytest.mark.usefixtures("index")
def test_a_cached_file_with_a_changed_byte_is_replaced(cache: Path) -> None:
    path = ensure_model(NAME, cache_dir=cache)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DownloadError) as caught:
        ensure_model(NAME, cache_dir=cache, offline=True)
    assert str(caught.value).startswith(f"{path} is damaged and downloads are switched off; run ")
    assert ensure_model(NAME, cache_dir=cache) == path
    assert path.read_bytes() == whole


def test_a_real_checkpoint_is_converted(
    index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_1")
    checkpoint = write_gguf(tmp_path / "tiny.gguf", TINY, tensors).read_bytes()
    monkeypatch.setitem(DEFAULT_MODELS, NAME, make_wheel(index, checkpoint))
    monkeypatch.setattr(default_model, "_convert", CONVERT)
    calls: list[tuple[str, int, int]] = []
    path = ensure_model(NAME, cache_dir=cache, progress=lambda *call: calls.append(call))
    with LutFile.open(path) as file:
        assert file.config == TINY
        assert file.source.items() >= DEFAULT_MODELS[NAME].source.items()
        assert file.linear("lm_head.weight")[1].bits == 4
    converted = [(done, total) for phase, done, total in calls if phase == "convert"]
    assert converted[0][0] == 0
    assert converted[-1][0] == converted[-1][1] > 0
    assert listing(cache) == [path.name, f"{NAME}.lock"]


@pytest.mark.usefixtures("index")
def test_leftovers_of_dead_runs_are_removed(cache: Path) -> None:
    leftover = cache / f"{NAME}.partial-abc"
    leftover.mkdir(parents=True)
    (leftover / cached_path(NAME, cache).name).write_bytes(b"half a file")
    path = ensure_model(NAME, cache_dir=cache)
    assert listing(cache) == [path.name, f"{NAME}.lock"]


def test_the_wheel_is_pinned(index: Path, cache: Path) -> None:
    make_wheel(index, CHECKPOINT[:-1] + b"!")
    text = refusal(cache)
    assert f"{WHEEL} has" in text


def test_equal_size_is_not_enough(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(index.iterdir())
    pins = replace(DEFAULT_MODELS[NAME], wheel_sha256="0" * 64)
    monkeypatch.setitem(DEFAULT_MODELS, NAME, pins)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert refusal(cache) == f"{wheel.name} has SHA-256 {digest}, not the pinned one"


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("pins", "text"),
    [
        ({"member_sha256": "0" * 64}, f"{MEMBER} has SHA-256"),
        ({"member": "other"}, "There is no item named 'other'"),
    ],
)
def test_the_file_in_the_wheel_is_pinned(
    cache: Path, monkeypatch: pytest.MonkeyPatch, pins: dict[str, str], text: str
) -> None:
    monkeypatch.setitem(DEFAULT_MODELS, NAME, replace(DEFAULT_MODELS[NAME], **pins))  # type: ignore[arg-type]
    assert text in refusal(cache)


def test_a_package_that_is_not_there(index: Path, cache: Path) -> None:
    next(index.iterdir()).unlink()
    expected = "pip could not download tmac-tiny==1.0: No matching distribution found for"
    assert refusal(cache).startswith(expected)


@pytest.mark.usefixtures("index")
def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert "downloads are switched off" in refusal(cache, offline=True)
    assert not cache.exists()
    for value in ("1", "true", "yes"):
        monkeypatch.setenv("TMAC_OFFLINE", value)
        assert "downloads are switched off" in refusal(cache)


def test_unknown_names_list_the_known_ones(cache: Path) -> None:
    with pytest.raises(DownloadError, match="no model is called 'gpt-5' \\(smollm2-135m"):
        ensure_model("gpt-5", cache_dir=cache)


@POSIX
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo $0: No module named pip >&2; exit 1", "-m ensurepip"),
        ("echo 'WARNING: odd' >&2; echo 'ERROR: disk is full' >&2; exit 1", "disk is full"),
        (
            "echo 'WARNING: Retrying (Retry(total=0' >&2; echo 'ERROR: none' >&2; exit 1",
            "none (the package index could not be reached)",
        ),
        ("exit 3", "no message"),
        ("exit 0", "brought 0 wheels, not one"),
    ],
)
def test_pip_failures_are_one_line(
    cache: Path, interpreter: Interpreter, script: str, text: str
) -> None:
    interpreter(script)
    assert text in refusal(cache)


@pytest.mark.usefixtures("index")
def test_no_interpreter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "cannot run '/nonexistent/python'" in refusal(cache)


@POSIX
@pytest.mark.usefixtures("index")
def test_pip_works_inside_the_cache_only(cache: Path, interpreter: Interpreter) -> None:
    interpreter('echo "ERROR: $TMPDIR | $*" >&2; exit 1')
    text = refusal(cache)
    assert f"{cache}/{NAME}.partial-" in text.partition("|")[0]
    assert "-m pip download --no-deps --only-binary=:all:" in text
    assert text.endswith(" tmac-tiny==1.0")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(_model: PackagedModel, _gguf: Path, out: Path, _report: object) -> None:
        out.write_bytes(b"half")
        raise error

    monkeypatch.setattr(default_model, "_convert", stop)
    with pytest.raises(error):
        ensure_model(NAME, cache_dir=cache)
    assert listing(cache) == [f"{NAME}.lock"]


CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
sys.path[:0] = {path!r}
import test_default_model as tests
from pathlib import Path
from tmac_py import default_model
tests.DEFAULT_MODELS[tests.NAME] = tests.pins_of(Path({index!r}) / tests.WHEEL)
default_model._convert = tests.fake_convert
sys.executable = {python!r}
print(default_model.ensure_model(tests.NAME, cache_dir=Path({cache!r})))
"""


def start_child(index: Path, cache: Path, python: str) -> subprocess.Popen[str]:
    """The same call in a process of its own."""
    code = CHILD.format(path=sys.path, index=str(index), cache=str(cache), python=python)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_download_is_never_taken_for_a_model(
    index: Path, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    slow = tmp_path / "slow-python"
    slow.write_text(
        '#!/bin/sh\necho half > "$TMPDIR/half.whl"\nwhile kill -0 $PPID; do sleep 0.05; done\n'
    )
    slow.chmod(0o755)
    child = start_child(index, cache, str(slow))
    wait_for(lambda: list(cache.glob(f"{NAME}.partial-*/pip/half.whl")))
    child.send_signal(number)
    child.communicate()
    assert child.returncode != 0
    assert not cached_path(NAME, cache).exists()
    if number == signal.SIGINT:
        assert listing(cache) == [f"{NAME}.lock"]
    path = ensure_model(NAME, cache_dir=cache)
    LutFile.open(path).close()
    assert listing(cache) == [path.name, f"{NAME}.lock"]


def test_two_processes_share_one_download(index: Path, cache: Path) -> None:
    children = [start_child(index, cache, sys.executable) for _ in range(2)]
    for child in children:
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        assert output.strip() == str(cached_path(NAME, cache))
    LutFile.open(cached_path(NAME, cache)).close()
    assert listing(cache) == [cached_path(NAME, cache).name, f"{NAME}.lock"]


@pytest.mark.usefixtures("index")
def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMAC_CACHE", str(tmp_path / "environment"))
    assert cached_path(NAME).parent == tmp_path / "environment"
    assert cached_path(NAME, tmp_path / "option").parent == tmp_path / "option"
    monkeypatch.delenv("TMAC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_path(NAME).parent.name == "tmac_py"


@pytest.mark.usefixtures("index")
def test_another_format_does_not_use_the_cached_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {cached_path(NAME, cache)}
    for attribute in ("FORMAT_VERSION", "RECIPE"):
        monkeypatch.setattr(default_model, attribute, 99)
        names.add(cached_path(NAME, cache))
    assert len(names) == 3
