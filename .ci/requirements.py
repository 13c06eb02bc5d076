"""Prints what an extra of the installed package requires besides itself: requirements.py EXTRA."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import requires


def required(extra: str) -> Iterator[str]:
    """The requirements of an extra and of those that it names."""
    for requirement in requires("tmac_py") or ():
        wanted, _, condition = requirement.partition(";")
        if condition.strip().removeprefix("extra == ").strip("'\"") != extra:
            continue
        if own := re.fullmatch(r"tmac[-_]py\[(.*)\]", wanted.strip()):
            for other in own[1].split(","):
                yield from required(other)
        else:
            yield wanted.strip()


print(*required(sys.argv[1]), sep="\n")
