"""A lock between processes that the system drops when its holder dies."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
    import time
else:
    import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def lock_file(path: Path, *, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold an exclusive lock on the file at ``path``, which is created and stays.

    ``waiting`` is called once if another process holds it. Yields False, without a lock, on file
    systems that have none. Raises OSError where the file cannot be made.
    """
    with path.open("ab") as file:
        locked = True
        try:
            try:
                _lock(file, wait=False)
            except BlockingIOError:
                waiting()
                _lock(file, wait=True)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        yield locked


def create_held(path: Path) -> FileIO | None:
    """Make the file at ``path`` and hold it, as long as it is open, against `remove_unheld`.

    None where that removed it meanwhile. Raises OSError for a file that is there or cannot be made.
    """
    file = path.open("xb", buffering=0)
    try:
        _lock(file, wait=True)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
    if path.exists():
        return file
    file.close()
    return None


def remove_unheld(path: Path) -> None:
    """Remove a file made by `create_held` whose process has died, where that is sure."""
    with suppress(OSError), path.open("rb") as file:
        _lock(file, wait=False)
        path.unlink()


def _lock(file: IO[Any], *, wait: bool) -> None:
    """Lock ``file`` until it is closed; BlockingIOError where another has it and we do not wait."""
    if sys.platform == "win32":  # its first byte, which others cannot read meanwhile
        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "held by another process") from None
                time.sleep(0.05)
            else:
                return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
