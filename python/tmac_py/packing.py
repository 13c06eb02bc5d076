"""From a quantised matrix to packed bytes, and from those to a matrix of the core."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.quant import QuantTensor
from tmac_py.spec import LinearSpec


def pack(q: QuantTensor) -> NDArray[np.uint8]:
    """Codes, scales and offsets in the layout of ``q.spec``: uint8 ``[nbytes]``.

    ``q.order`` is not part of it.
    """
    return _core.pack(
        q.codes,
        q.scales,
        q.offsets,
        bits=q.bits,
        group_size=q.group_size,
        offset_kind=q.offset_kind,
        encoding=q.encoding,
        scale=q.scale,
    )


def open_linear(
    packed: NDArray[np.uint8], spec: LinearSpec, order: NDArray[np.int32] | None = None
) -> _core.Linear:
    """The core's view of ``packed``, which it keeps alive and does not copy.

    ``order`` is as in QuantTensor; it is copied. Raises ValueError where bytes, ``spec`` and
    ``order`` do not fit together.
    """
    return _core.Linear(
        packed,
        m=spec.m,
        k=spec.k,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
        zero=spec.zero,
        encoding=spec.encoding,
        scale=spec.scale,
        order=order,
    )
