"""Reading safetensors files lazily: the header is checked, tensors are views of the mapped file.

The safetensors package's NumPy reader knows no bfloat16, which most checkpoints are in.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.errors import ModelFileError

_MAX_HEADER = 100_000_000  # the limit of the format

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # bits of a bfloat16
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
"""safetensors dtype -> NumPy dtype of its bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; ``start`` is its offset in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def load(self) -> NDArray[Any]:
        """The tensor as a read-only view of the file, in the dtype ``DTYPES`` gives."""
        kind = np.dtype(DTYPES[self.dtype])
        if 0 in self.shape:
            return np.empty(self.shape, kind)
        return np.memmap(self.path, kind, "r", self.start, self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file. Raises ModelFileError for a file that is cut or inconsistent."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ModelFileError(f"{path}: not a safetensors file, or a truncated one")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: broken safetensors header: {error}") from error
    for tensor in tensors.values():
        end = tensor.start + math.prod(tensor.shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
        if end > size:
            raise ModelFileError(
                f"{path}: truncated: tensor {tensor.name} ends at byte {end}, the file at {size}"
            )
    return tensors


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
    if end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"tensor {name} {list(shape)} does not fill its {end - start} bytes")
    return StoredTensor(path, name, dtype, shape, data_start + start)
