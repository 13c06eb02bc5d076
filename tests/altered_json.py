"""JSON values of every wrong form, for the tests of readers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

WRONG: list[Any] = [None, True, -1, 1.5, "x", "\ud800", [], ["x"], [[]], [None], {}, {"x": ["x"]}]
"""JSON values that are not what is expected somewhere; the surrogate is half a character."""


def alterations(value: Any) -> Iterator[Any]:
    """``value`` with each part in turn, at any depth, replaced by each of the wrong values."""
    yield from WRONG
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, list | dict) else ():
        for wrong in alterations(value[key]):
            changed = copy.copy(value)
            changed[key] = wrong
            yield changed
