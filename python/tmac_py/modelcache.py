"""The folder of converted models: where it is, and how a file in it comes to be whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile

Progress = Callable[[str, int, int], None]
"""Called with a phase of PHASES, and how much of how much is done (bytes, weights to convert)."""

PHASES = ("wait", "download", "check", "unpack", "convert")
"""In order; "wait" (for another process that does the work) comes without amounts."""

RECIPE = 3
"""Raised whenever a conversion with default options changes its result."""


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of converted models: the argument, else $TMAC_CACHE, else the user's cache."""
    if cache_dir is not None:
        return Path(os.path.expanduser(cache_dir))  # noqa: PTH111 - Path's raises for "~nobody"
    if environment := os.environ.get("TMAC_CACHE"):
        return Path(os.path.expanduser(environment))  # noqa: PTH111
    return platformdirs.user_cache_path("tmac_py", appauthor=False)


def no_progress(_phase: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def is_whole(path: Path) -> bool:
    """Whether the cached file is there and matches its checksums."""
    try:
        LutFile.open(path).close()
    except ModelFileError:
        return False
    return True


def offline_by_environment() -> bool:
    """Whether TMAC_OFFLINE forbids downloads."""
    return os.environ.get("TMAC_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")


@contextmanager
def work_folder(parent: Path, prefix: str, *, clean: bool) -> Iterator[Path]:
    """A new folder; with ``clean`` (no other run is alive) those of dead runs are removed first."""
    import shutil
    import tempfile

    for leftover in parent.glob(f"{prefix}*") if clean else ():
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as work:
        yield Path(work)
