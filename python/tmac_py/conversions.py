"""Checkpoints used in place of a .lut: converted once, kept in the cache folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmac_py.errors import ModelFileError
from tmac_py.filelock import lock_file
from tmac_py.lutfile import LutFile
from tmac_py.lutheader import FORMAT_VERSION
from tmac_py.modelcache import (
    RECIPE,
    Progress,
    cache_folder,
    no_progress,
    offline_by_environment,
    work_folder,
)

if TYPE_CHECKING:
    from tmac_py.converters.hub import HubId

Warn = Callable[[str], None]

_READ = (".gguf", ".safetensors", ".json", ".jinja", ".model")
"""Endings of the files of a folder that a conversion may read."""


def is_checkpoint(path: Path) -> bool:
    """Whether the file or folder at ``path`` is to be converted: GGUF files and folders are."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def ensure_converted(
    source: Path,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Path:
    """Path of the .lut made of a GGUF file or Hugging Face folder, converted if it is not cached.

    The result belongs to the source's path, its size and the time of its last change; that of an
    earlier state is removed. Options are those of ``tmac-convert`` without options. Several
    processes may call this at once: one works, the others wait.

    Raises:
        ModelFileError, UnsupportedError: as ``tmac_py.converters.convert``.
        OSError: full disk, no rights.
    """
    path = source.resolve()
    files = sorted(file for file in path.iterdir() if file.suffix in _READ) if path.is_dir() else []
    stats = [(file.name, file.stat()) for file in files or [path]]
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    entry = _Entry(cache_folder(cache_dir), path.stem if path.is_file() else path.name, str(path))
    return entry.ensure(
        state, lambda: (path, str(source), None), progress or no_progress, warn or _no_warning
    )


def ensure_from_hub(
    hub_id: HubId,
    *,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> Path:
    """The same of a repository on the Hugging Face hub, at the commit its revision is at today.

    With ``offline``, TMAC_OFFLINE=1 or HF_HUB_OFFLINE=1, or without a connection: what was
    converted last, or is made of what the hub's own cache has. ``quiet``: downloads without bars.
    Raises as :func:`ensure_converted`.
    """
    from tmac_py.converters.hub import locate

    entry = _Entry(cache_folder(cache_dir), str(hub_id).replace("/", "--"), repr(hub_id))
    try:
        located = locate(hub_id, offline=offline or offline_by_environment())
    except ModelFileError:
        if (latest := entry.latest()) is not None:
            return latest
        raise

    def fetch() -> tuple[Path, str, str | None]:
        path, name = located.fetch(quiet=quiet)
        return path, str(hub_id), name

    return entry.ensure(located.name, fetch, progress or no_progress, warn or _no_warning)


class _Entry:
    """The place of one source in the cache: one file for its present state."""

    def __init__(self, folder: Path, label: str, identity: str) -> None:
        self._folder = folder
        readable = re.sub(r"[^\w.-]+", "-", label)[:80]
        self._prefix = f"{readable}-{_digest(identity)}-format{FORMAT_VERSION}-recipe{RECIPE}"

    def latest(self) -> Path | None:
        """The file that was converted last."""
        found = [path for path in self._folder.glob(f"{self._prefix}-*.lut") if _is_readable(path)]
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)

    def ensure(
        self,
        state: object,
        fetch: Callable[[], tuple[Path, str, str | None]],
        report: Progress,
        warn: Warn,
    ) -> Path:
        """The file of this ``state``.

        ``fetch`` gives the source's path, how errors call it, and what the .lut says of its origin
        (None: what its reader says).
        """
        path = self._folder / f"{self._prefix}-{_digest(state)}.lut"
        if _is_readable(path):
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._folder / f"{self._prefix}.lock"
        with lock_file(lock, waiting=lambda: report("wait", 0, 0)) as locked:
            if not _is_readable(path):
                source, name, origin = fetch()
                partial = f"{self._prefix}.partial-"
                with work_folder(self._folder, partial, clean=locked) as work:
                    _convert(source, name, origin, work / path.name, report, warn)
                    (work / path.name).replace(path)
                for old in self._folder.glob(f"{self._prefix}-*.lut"):
                    if old != path:
                        old.unlink(missing_ok=True)
        return path


def _convert(
    source: Path, name: str, origin: str | None, out: Path, report: Progress, warn: Warn
) -> None:
    # Imported here because a cached model needs none of it.
    from tmac_py.converters import (
        QuantOptions,
        check_codebooks,
        convert_checkpoint,
        open_checkpoint,
    )
    from tmac_py.converters.checkpoint import naming

    checkpoint = open_checkpoint(source)
    if origin is not None:
        checkpoint = replace(checkpoint, source={**checkpoint.source, "file": origin})
    check_codebooks(name, checkpoint, requantize=False)
    for text in checkpoint.warnings:
        warn(text)
    with naming(name):
        convert_checkpoint(
            checkpoint,
            out,
            QuantOptions(),
            progress=lambda done, total, _: report("convert", done, total),
        )


def _is_readable(path: Path) -> bool:
    """Whether the file is there and of this format; whoever loads it compares the checksums."""
    try:
        LutFile.open(path, check=False).close()
    except ModelFileError:
        return False
    return True


def _digest(value: object) -> str:
    import hashlib  # of OpenSSL, which a run of a .lut does not need

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _no_warning(_text: str) -> None:
    pass
