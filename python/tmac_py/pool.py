"""Teams of threads, shared by all that computes with the same number of them."""

from __future__ import annotations

import os
from weakref import WeakValueDictionary

from tmac_py import _core
from tmac_py.errors import OptionError

_pools: WeakValueDictionary[tuple[int, int], _core.ThreadPool] = WeakValueDictionary()


def thread_pool(threads: int) -> _core.ThreadPool:
    """The team of ``threads`` of this process; it ends with the last reference to it.

    A team does one piece of work at a time, so models that share it take turns.

    Raises:
        OptionError: the system does not allow that many threads.
    """
    key = os.getpid(), threads  # threads do not survive a fork
    pool = _pools.get(key)
    if pool is None:
        try:
            pool = _pools[key] = _core.ThreadPool(threads)
        except RuntimeError as error:
            raise OptionError(str(error)) from error
    return pool
