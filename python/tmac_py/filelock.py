"""A lock between processes that the system drops when its holder dies."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        yield locked
