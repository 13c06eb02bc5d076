"""Prints what extras of the installed package require besides itself: requirements.py EXTRA ..."""

from __future__ import annotations

import sys
from importlib.metadata import requires

for requirement in requires("tmac_py") or ():
    wanted, _, condition = requirement.partition(";")
    extra = condition.strip().removeprefix("extra == ").strip("'\"")
    if extra in sys.argv[1:] and not wanted.startswith("tmac_py"):
        print(wanted.strip())
