"""safetensors files whose tensors have several dtypes, among them some that NumPy lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I8": "i1",
    "U8": "u1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}
"""safetensors dtype -> NumPy dtype; 8-bit floats are given as bytes."""


def save_mixed(
    path: Path,
    tensors: dict[str, NDArray[Any]],
    dtype: str,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file of tensors stored as ``dtype``, but for those that ``dtypes`` names.

    bfloat16 is made by cutting float32 in half.
    """
    header, data = {}, b""
    for name, w in tensors.items():
        kind = (dtypes or {}).get(name, dtype)
        if kind == "BF16":
            raw = (np.ascontiguousarray(w, np.float32).view(np.uint32) >> 16).astype("<u2")
        else:
            raw = w.astype(STORED[kind])
        content = raw.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(w.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parse(data: bytes) -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file of bfloat16 tensors, as float32, and others."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[start + begin : start + end], np.uint8)
        if entry["dtype"] == "BF16":
            stored = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            stored = raw.view(STORED[entry["dtype"]])
        arrays[name] = stored.reshape(entry["shape"])
    return arrays
