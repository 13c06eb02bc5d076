"""NumPy work on all cores, in pieces whose results do not depend on how many cores there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic
from typing import TypeVar

from tmac_py.machine import default_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]``, several at a time: NumPy releases the GIL.

    The first exception is raised after the pieces under way have ended.
    """
    work = list(items)
    threads = min(_threads(default_threads, int(monotonic())), len(work))
    if threads <= 1:
        return [function(item) for item in work]
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    left = iter(enumerate(work))  # the next item is taken in one step of the interpreter

    def work_off() -> None:
        while not errors and (taken := next(left, None)) is not None:
            i, item = taken
            try:
                results[i] = function(item)
            except BaseException as error:
                errors[i] = error

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work_off) for _ in range(threads - 1)]
        try:
            work_off()
            for other in others:
                other.result()
        except BaseException as error:  # KeyboardInterrupt between two items
            errors[-1] = error
            raise
    if errors:  # Items are taken in order: all before the first that failed have been done.
        raise errors[min(errors)]
    return [results[i] for i in range(len(work))]


@lru_cache(maxsize=1)
def _threads(default: Callable[[], int], _second: int) -> int:
    """``default()``, which reads many small files of the system, at most once a second."""
    return default()


class Background:
    """A thread that does one piece of work at a time while the caller goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._work: Future[None] | None = None

    def run(self, function: Callable[[], None]) -> None:
        """Start ``function`` once the piece before has ended; raises what that raised."""
        self.wait()
        self._work = self._pool.submit(function)

    def wait(self) -> None:
        """Return when all work is done; raises what it raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """End the thread, after the work that it is at."""
        self._pool.shutdown(wait=True)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep BLAS, of the whole process, to the calling thread.

    How it splits a product moves the last bits; with pieces of fixed size in `map_threads` the
    cores are busy all the same.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield
