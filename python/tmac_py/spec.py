"""What a packed matrix is: its shape, its encoding and the name of its byte layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OffsetKind = Literal["none", "offset", "zero"]

Tables = Literal["int8", "exact", "exact8"]
"""Lookup tables: of 8 bits, with a step per 4 weights; or exact sums of activations rounded to 14
bits per 64 weights, or (`exact8`, BitNet's arithmetic) to 8 bits per token."""

KvType = Literal["f16", "int8", "int4"]
"""How a KV cache stores keys or values (docs/attention.md)."""

Encoding = Literal["uniform", "ternary", "bcq"]
"""Codes: evenly spaced, of 1 to 8 bits; or 0, 1 and 2 for the weights -1, 0 and 1; or of 1 to 4
bits that each have a scale (binary-coding quantisation: Park et al., 2024, LUT-GEMM)."""

LAYOUTS: dict[Encoding, str] = {
    "uniform": "planes421-m32",
    "ternary": "trits3-m32",
    "bcq": "bcq-m32",
}
"""Names of the packed layouts of the encodings (docs/lut-format.md)."""


@dataclass(frozen=True)
class LinearSpec:
    """Shape and encoding of one packed matrix ``[m, k]``.

    ``w[i, j] = scales[i, g] * (codes[i, j] - zero) `` with ``g = j // group_size`` and

    - ``offset_kind == "none"``: ``zero`` is the constant below, nothing is stored per group;
    - ``"zero"``: a zero point (fp16) is stored per row and group: ``scales * (codes - zeros)``;
    - ``"offset"``: an offset (fp16) is stored per row and group: ``scales * codes + offsets``.

    Ternary matrices have 2 bits, offset kind ``"none"`` and ``zero`` 1. They may have one ``scale``
    (float32) for the whole matrix; then none are stored, and ``group_size`` is ``k``.

    Binary-coded matrices (``encoding == "bcq"``) have 1 to 4 bits, offset kind ``"offset"``,
    ``zero`` 0 and a scale for each bit, of any sign: ``w[i, j]`` is the sum of ``offsets[i, g]``
    and, for each bit ``p``, of ``scales[i, g, p]`` if it is set in ``codes[i, j]``, and of
    ``-scales[i, g, p]`` if not.
    """

    m: int
    k: int
    bits: int
    group_size: int
    offset_kind: OffsetKind = "none"
    zero: float = 0.0
    layout: str = LAYOUTS["uniform"]
    scale: float | None = None

    @property
    def encoding(self) -> Encoding:
        """The encoding whose layout this is. Raises KeyError for a layout that is not known."""
        return {layout: encoding for encoding, layout in LAYOUTS.items()}[self.layout]
