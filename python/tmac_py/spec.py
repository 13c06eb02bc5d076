"""What a packed matrix is: its shape, its encoding and the name of its byte layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OffsetKind = Literal["none", "offset", "zero"]

Tables = Literal["int8", "exact"]
"""Lookup tables: 8 bits with a scale per 16 weights, or activations of 14 bits and exact sums."""

LAYOUT = "planes421-m32"
"""Name of the only packed layout of this version (docs/lut-format.md)."""


@dataclass(frozen=True)
class LinearSpec:
    """Shape and encoding of one packed matrix ``[m, k]``.

    ``w[i, j] = scales[i, g] * (codes[i, j] - zero) `` with ``g = j // group_size`` and

    - ``offset_kind == "none"``: ``zero`` is the constant below, nothing is stored per group;
    - ``"zero"``: a zero point (fp16) is stored per row and group: ``scales * (codes - zeros)``;
    - ``"offset"``: an offset (fp16) is stored per row and group: ``scales * codes + offsets``.
    """

    m: int
    k: int
    bits: int
    group_size: int
    offset_kind: OffsetKind = "none"
    zero: float = 0.0
    layout: str = LAYOUT
