"""Ending a generation from outside of it."""

from __future__ import annotations

from typing import Generic, Literal, Protocol

from tmac_py.decoding import CacheT, Forward, Ids, Logits
from tmac_py.errors import OptionError


class Cancel(Protocol):
    """Says when to end; ``threading.Event`` is one. Asked before every pass over the weights."""

    def is_set(self) -> bool:
        """Whether to end."""


def check_cancel(cancel: object) -> None:
    """OptionError for what is neither a Cancel nor None."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise OptionError(f"cancel is {cancel!r}; allowed: a threading.Event, or what has is_set")


class AnyOf:
    """A Cancel that is set when one of several is."""

    def __init__(self, *cancels: Cancel | None) -> None:
        self._cancels = [cancel for cancel in cancels if cancel is not None]

    def is_set(self) -> bool:
        """Whether to end."""
        return any(cancel.is_set() for cancel in self._cancels)


class CancelledStep(Exception):  # noqa: N818 - ends a generation, and is no error
    """Raised in place of a step that is not wanted any more; the package handles it."""


def check_cancelled(cancel: Cancel | None) -> None:
    """Raise CancelledStep if it is set."""
    if cancel is not None and cancel.is_set():
        raise CancelledStep


def cancellable(forward: Forward[CacheT], cancel: Cancel | None) -> Forward[CacheT]:
    """The steps of a model until ``cancel`` is set; then they raise CancelledStep."""
    return forward if cancel is None else _Cancellable(forward, cancel)


class _Cancellable(Generic[CacheT]):
    def __init__(self, forward: Forward[CacheT], cancel: Cancel) -> None:
        self._forward = forward
        self._cancel = cancel

    def __call__(self, ids: Ids, cache: CacheT, logits: Literal["last", "all"] = "last") -> Logits:
        """As :class:`tmac_py.decoding.Forward`."""
        check_cancelled(self._cancel)
        return self._forward(ids, cache, logits)
