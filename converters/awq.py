"""AWQ as AutoAWQ, LLM-AWQ and their successors store it: 4 bits, a zero point per group.

======== ============== ======================= ===================================================
version  qweight        scales                  zero points
======== ============== ======================= ===================================================
gemm     I32 [k, m/8]   [groups, m]             qzeros I32 [groups, m/8]; both in an order of 8
gemv     I32 [m, k/8]   [m, padded groups]      qzeros I32 [m, padded groups / 8]
fast     I16 [m/4, k]   [padded groups, m]      qzeros or scaled_zeros like scales: -scale * zero
======== ============== ======================= ===================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.converters.bit_fields import unpack_fields
from tmac_py.converters.checkpoint import Shape
from tmac_py.converters.grouped_codes import (
    bias_expected,
    check_group_size,
    grouped_tensor,
    load_half,
    refuse_bias,
    whole_number,
)
from tmac_py.converters.weight_format import (
    DENSE,
    FLOATS,
    Expected,
    FormatOf,
    Parts,
    WeightFormat,
    is_dense,
)
from tmac_py.errors import UnsupportedError
from tmac_py.parallel import map_threads
from tmac_py.quant import QuantTensor, count_groups, resolve_group_size, row_chunks

_BITS = 4
_FIELDS = 8  # of a word
_FIELD_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)
"""gemm: where a word holds each of its 8 rows of the matrix."""

_CHUNK_WEIGHTS = 1 << 17
"""Weights that one thread unpacks at once."""

_CHUNK_ROWS_WEIGHTS = 1 << 20
"""gemm: the same; neighbouring words are of neighbouring rows."""

_FAST_COLUMNS = 64
"""fast: so many columns of 4 rows stand together."""


@dataclass(frozen=True)
class Gemm:
    """Words along m; see WeightFormat."""

    group_size: int

    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        m, k = shape
        groups, words = _groups(k, self.group_size), -(-m // _FIELDS)
        return {
            "qweight": Expected((k, words), ("I32",)),
            "qzeros": Expected((groups, words), ("I32",)),
            "scales": Expected((groups, m), FLOATS),
            **bias_expected(m, parts),
        }

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        m, _ = shape
        refuse_bias(parts)
        return grouped_tensor(
            self._rows(parts["qweight"].load(), m),
            load_half(parts["scales"]).T,
            self._rows(parts["qzeros"].load(), m),
            bits=_BITS,
            group_size=self.group_size,
        )

    @staticmethod
    def _rows(words: NDArray[Any], m: int) -> NDArray[np.uint8]:
        """Words ``[n, m/8]`` -> their fields ``[m, n]``."""
        n, n_words = words.shape
        rows = np.empty((n_words, _FIELDS, n), np.uint8)

        def unpack(part: slice) -> None:
            out = rows[part].reshape(-1, n)
            _core.unpack_nibble_rows(words[:, part], out, _FIELD_OF_ROW)

        map_threads(unpack, row_chunks(n_words, n * _FIELDS, _CHUNK_ROWS_WEIGHTS))
        return rows.reshape(-1, n)[:m]


@dataclass(frozen=True)
class Gemv:
    """Words along k; see WeightFormat."""

    group_size: int

    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        m, k = shape
        padded = _padded_groups(k, self.group_size)
        return {
            "qweight": Expected((m, -(-k // _FIELDS)), ("I32",)),
            "qzeros": Expected((m, padded // _FIELDS), ("I32",)),
            "scales": Expected((m, padded), FLOATS),
            **bias_expected(m, parts),
        }

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        _, k = shape
        refuse_bias(parts)
        groups = _groups(k, self.group_size)
        return grouped_tensor(
            unpack_fields(parts["qweight"].load(), _BITS, k),
            load_half(parts["scales"])[:, :groups],
            unpack_fields(parts["qzeros"].load(), _BITS, groups),
            bits=_BITS,
            group_size=self.group_size,
        )


@dataclass(frozen=True)
class GemvFast:
    """Four rows at a time, and offsets in place of zero points; see WeightFormat."""

    group_size: int

    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        m, k = shape
        if m % 4 or k % _FAST_COLUMNS:
            raise UnsupportedError(
                f"AWQ gemv_fast needs m a multiple of 4 and k of {_FAST_COLUMNS}, found {[m, k]}"
            )
        padded = _padded_groups(k, self.group_size)
        return {
            "qweight": Expected((m // 4, k), ("I16",)),
            _offsets_name(parts): Expected((padded, m), FLOATS),
            "scales": Expected((padded, m), FLOATS),
            **bias_expected(m, parts),
        }

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        m, k = shape
        refuse_bias(parts)
        words = parts["qweight"].load().view(np.uint16)
        codes = np.empty((m // 4, 4 * k), np.uint8)

        def unpack(part: slice) -> None:
            fields = np.empty((*words[part].shape, 4), np.uint8)
            for i in range(4):
                fields[..., i] = words[part] >> np.uint16(_BITS * i) & np.uint16(0xF)
            # A word has 4 neighbours of a row; 64 columns of a row are followed by those of the
            # next.
            rows = fields.reshape(-1, k // _FAST_COLUMNS, 4, _FAST_COLUMNS).swapaxes(1, 2)
            # 32 columns are shuffled: eights hold the pairs 0, 4, 8, 12, ..., first their even
            # columns.
            pairs = rows.reshape(-1, k // 32, 4, 2, 4).transpose(0, 1, 4, 2, 3)
            codes[part] = pairs.reshape(-1, 4 * k)

        map_threads(unpack, row_chunks(m // 4, 4 * k, _CHUNK_WEIGHTS))
        groups = _groups(k, self.group_size)
        return QuantTensor(
            codes.reshape(m, k),
            np.ascontiguousarray(load_half(parts["scales"])[:groups].T),
            np.ascontiguousarray(load_half(parts[_offsets_name(parts)])[:groups].T),
            _BITS,
            resolve_group_size(k, self.group_size),
            "offset",
        )


_VERSIONS: dict[str, type[Gemm | Gemv | GemvFast]] = {
    "gemm": Gemm,
    "gemv": Gemv,
    "gemv_fast": GemvFast,
    "llm-awq": GemvFast,
}


def awq_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The format of each module by the settings of AutoAWQ.

    Raises UnsupportedError or ModelFileError for settings that cannot be read.
    """
    version = str(
        settings.get("version")
        or settings.get("checkpoint_format")
        or settings.get("format")
        or "gemm"
    ).lower()
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"AWQ version {version!r} is not supported ({', '.join(sorted(_VERSIONS))})"
        )
    bits = whole_number(settings, "bits", "w_bit", default=_BITS)
    if bits != _BITS:
        raise UnsupportedError(f"AWQ with {bits} bits is not supported ({_BITS})")
    group_size = whole_number(settings, "group_size", "q_group_size", default=128)
    weights = _VERSIONS[version](check_group_size(group_size))

    def of_module(_module: str, parts: Parts) -> WeightFormat:
        return DENSE if is_dense(parts) else weights

    return of_module


def _groups(k: int, group_size: int) -> int:
    return count_groups(k, resolve_group_size(k, group_size))


def _padded_groups(k: int, group_size: int) -> int:
    """Groups of a row as the kernels of AutoAWQ read them: whole words of zero points, and of these
    a multiple of 1, 2 or 4."""
    size = resolve_group_size(k, group_size)
    words = {64: 2, 32: 4}.get(size, 1)
    return -(-count_groups(k, size) // (words * _FIELDS)) * words * _FIELDS


def _offsets_name(parts: Parts) -> str:
    return "scaled_zeros" if "scaled_zeros" in parts else "qzeros"
