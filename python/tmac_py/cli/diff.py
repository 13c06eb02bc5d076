"""``tmac inspect --diff``: where two .lut files differ, and by how much their weights do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.cli.tables import format_table
from tmac_py.lutfile import LutFile
from tmac_py.lutheader import TensorEntry
from tmac_py.packing import unpack_rows

_ROWS_ELEMENTS = 1 << 22
"""Weights of a matrix that are compared at once."""


def compare(first: LutFile, second: LutFile) -> dict[str, Any]:
    """All differences as JSON values; empty ones are left out.

    ``relative_error`` of a tensor is the norm of the difference over that of the first's weights,
    null where shapes differ or one of them is no matrix or vector of floats.
    """
    a, b = first.tensors, second.tensors
    found = {
        "config": _changed(first.config.to_dict(), second.config.to_dict()),
        "source": _changed(first.source, second.source),
        "only_in_first": [name for name in a if name not in b],
        "only_in_second": [name for name in b if name not in a],
        "tensors": [
            _tensor(first, second, name) for name in a if name in b and not _equal(a[name], b[name])
        ],
    }
    return {name: value for name, value in found.items() if value}


def report(differences: Mapping[str, Any]) -> str:
    """The same for people."""
    if not differences:
        return "no differences"
    sections = []
    for name in ("config", "source"):
        if name in differences:
            rows = [(key, f"{old} -> {new}") for key, (old, new) in differences[name].items()]
            sections.append(f"{name}\n" + format_table(rows))
    for name in ("only_in_first", "only_in_second"):
        if name in differences:
            lines = "\n".join(f"  {tensor}" for tensor in differences[name])
            sections.append(f"{name.replace('_', ' ')}\n{lines}")
    if "tensors" in differences:
        table = [("tensor", "first", "second", "relative error")]
        table += [
            (
                item["name"],
                item["first"],
                item["second"],
                "-" if item["relative_error"] is None else f"{item['relative_error']:.3g}",
            )
            for item in differences["tensors"]
        ]
        sections.append(format_table(table, right="lllr", indent=""))
    return "\n\n".join(sections)


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*a, *b])
    return {n: [a.get(n), b.get(n)] for n in names if a.get(n) != b.get(n)}


def _equal(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.kind, a.shape, a.spec, a.xxh3) == (b.kind, b.shape, b.spec, b.xxh3)


def _tensor(first: LutFile, second: LutFile, name: str) -> dict[str, Any]:
    a, b = first.tensors[name], second.tensors[name]
    comparable = a.shape == b.shape and a.kind == b.kind and a.kind in ("linear", "float")
    return {
        "name": name,
        "first": _description(a),
        "second": _description(b),
        "relative_error": _relative_error(first, second, a) if comparable else None,
    }


def _description(entry: TensorEntry) -> str:
    shape = " x ".join(map(str, entry.shape))
    if entry.spec is None:
        return f"{entry.kind} {shape}"
    bits = "ternary" if entry.spec.encoding == "ternary" else f"{entry.spec.bits} bits"
    return f"{shape}, {bits}, groups of {entry.spec.group_size}"


def _relative_error(first: LutFile, second: LutFile, entry: TensorEntry) -> float:
    error = size = 0.0
    for a, b in zip(float_rows(first, entry), float_rows(second, entry), strict=True):
        error += float(np.square(b - a, dtype=np.float64).sum())
        size += float(np.square(a, dtype=np.float64).sum())
    return float(np.sqrt(error / size)) if size else float(error > 0)


def float_rows(file: LutFile, entry: TensorEntry) -> Iterator[NDArray[np.float32]]:
    """Float32: a vector or a router, or some rows ``[n, k]`` of a matrix at a time."""
    if entry.kind == "float":
        yield file.float(entry.name)
        return
    packed, spec = file.linear(entry.name)
    order = file.order(entry.name)
    step = max(1, _ROWS_ELEMENTS // spec.k)
    for start in range(0, spec.m, step):
        rows = slice(start, min(start + step, spec.m))
        yield unpack_rows(packed, spec, rows, order=order).dequantize()
