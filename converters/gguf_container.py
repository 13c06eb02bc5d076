"""Opening a GGUF file: the ``gguf`` package's reader, made strict about cut or altered files."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    ReaderField,
)
from numpy.typing import DTypeLike, NDArray

from tmac_py.errors import ModelFileError, UnsupportedError

T = TypeVar("T")

MAGIC = b"GGUF"

_SIZES = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
"""Type id -> name, weights of a block, bytes of a block."""

_I2_S, _TL1, _TL2 = 36, 38, 39
"""Type ids of bitnet.cpp, which others used for other types; 39 is MXFP4 elsewhere."""

_Q8_1_NBYTES = (36, 40)
"""Bytes of a Q8_1 block: as ggml defines it (two fp16 numbers and 32 codes), and as it once did and
the gguf package still does (two fp32 numbers)."""

_MAX_ARRAY = 1 << 24
"""Longest metadata array accepted; the largest vocabularies have 2^18 tokens and 2^19 merges."""

_READER_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What the reader raises on broken bytes (UnicodeDecodeError is a ValueError)."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its type's name, its shape with the fastest dimension last, its bytes, mapped.

    ``data`` is uint8 ``[rows, bytes of a row]``, and ``[1, bytes]`` for types that are not stored
    row by row. It is empty for the types TL1 and TL2, whose size a file does not say.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class GGUFFile:
    """A GGUF file: ``metadata`` (typed look-ups) and ``tensors`` by name, data mapped.

    Raises ModelFileError when the file is not a GGUF file, is cut short or is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(4)
        if start != MAGIC:
            raise ModelFileError(f"{path}: not a GGUF file (it starts with {start!r})")
        try:
            reader = _StrictReader(path)
        except _READER_ERRORS as error:
            raise ModelFileError(f"{path}: broken GGUF file: {_one_line(error)}") from error
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from error
        if reader.byte_order != "I":
            raise UnsupportedError(f"{path}: big-endian GGUF files are not supported")
        self.metadata = Metadata(path, reader.fields)
        self.tensors: dict[str, GGUFTensor] = reader.found


class Metadata:
    """The key-value part of a GGUF file; every look-up checks the type."""

    def __init__(self, path: Path, fields: Mapping[str, ReaderField]) -> None:
        self._path = path
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key``, checked, or ``default`` where there is no such key.

        Without a default a missing key raises ModelFileError. A whole number is
        accepted where ``float`` is asked for.
        """
        value = self.find(key, kind)
        if value is not None:
            return value
        if default is None:
            raise ModelFileError(f"{self._path}: metadata key {key} is missing")
        return default

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``, checked, or None where there is no such key."""
        field = self._fields.get(key)
        if field is None:
            return None
        try:
            value: Any = field.contents()
        except _READER_ERRORS as error:
            raise ModelFileError(
                f"{self._path}: metadata key {key} is unreadable: {_one_line(error)}"
            ) from error
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelFileError(
                f"{self._path}: metadata key {key} is of type {type(value).__name__}, "
                f"{kind.__name__} is needed"
            )
        return value

    def strings(self, key: str) -> list[str] | None:
        """An array of strings, or None where there is no such key."""
        return self._array(key, str)

    def numbers(self, key: str) -> list[Any] | None:
        """An array of numbers, or None where there is no such key."""
        return self._array(key, int, float)

    def _array(self, key: str, *kinds: type) -> list[Any] | None:
        values = self.find(key, list)
        if values is not None and not all(type(value) in kinds for value in values):
            raise ModelFileError(f"{self._path}: metadata key {key} holds values of another type")
        return values


class _StrictReader(GGUFReader):
    """GGUFReader that refuses to read past the end of the file, and reads arrays fast.

    The base class slices a memmap, which silently comes out short; an array length of 2^60 would
    keep it busy for years.
    """

    def _get(
        self,
        offset: int,
        dtype: DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> NDArray[Any]:
        kind = np.dtype(dtype)
        offset, count = int(offset), int(count)
        if offset + kind.itemsize * count > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, before the data it announces")
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, kind, count, offset).view(kind.newbyteorder(order))

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        count, at = int(length[0]), orig_offs + 12
        if count > _MAX_ARRAY:
            raise ValueError(f"an array of {count} values; at most {_MAX_ARRAY} are read")
        item = GGUFValueType(int(raw_item[0]))
        parts: list[NDArray[Any]] = [raw_item, length]
        if item == GGUFValueType.STRING:
            for _ in range(count):
                text = self._get(at + 8, np.uint8, self._get(at, np.uint64)[0])
                parts.append(text)
                at += 8 + text.size
        elif item in self.gguf_scalar_to_np:
            parts.append(self._get(at, self.gguf_scalar_to_np[item], count))
            at += parts[-1].nbytes
        else:
            raise ValueError(f"an array of {item.name} values")
        return at - orig_offs, parts, list(range(2, len(parts))), [GGUFValueType.ARRAY, item]

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        """Make ``found``; ``tensors`` of the base class, which knows fewer types, stays empty."""
        self.tensors = []
        self.found: dict[str, GGUFTensor] = {}
        starts = sorted({start_offs + int(field.parts[5][0]) for field in fields})
        after = dict(pairwise([*starts, self.data.size]))
        for field in fields:
            _, raw_name, _, dims, raw_type, offset = field.parts
            name = str(bytes(raw_name), encoding="utf-8")
            shape = tuple(int(dim) for dim in reversed(dims))
            start = start_offs + int(offset[0])
            if name in self.found:
                raise ValueError(f"tensor {name} is there twice")
            if not 1 <= len(shape) <= 4 or 0 in shape:
                raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
            kind, nbytes = self._kind_of(name, int(raw_type[0]), shape, after[start] - start)
            if start + nbytes > self.data.size:
                raise ValueError(
                    f"tensor {name} ends at byte {start + nbytes}, the file at {self.data.size}"
                )
            rows = 1 if kind == "I2_S" else math.prod(shape[:-1])
            data = self._get(start, np.uint8, nbytes).reshape(rows, nbytes // rows)
            self.found[name] = GGUFTensor(name, kind, shape, data)

    def _kind_of(
        self, name: str, type_id: int, shape: tuple[int, ...], room: int
    ) -> tuple[str, int]:
        """Name of a type and bytes of a tensor that has ``room`` bytes up to the next one."""
        n = math.prod(shape)
        name_of, block, size = _SIZES.get(type_id, ("", 1, 0))

        def fills(nbytes: int) -> bool:
            return nbytes <= room < nbytes + int(self.alignment)

        if type_id == _I2_S:
            if n % 4 or not fills(n // 4 + 32):
                raise UnsupportedError(
                    f"tensor {name} {list(shape)} has type {_I2_S} and takes {room} bytes; as "
                    f"bitnet.cpp's I2_S it would be {n // 4 + 32}, and other types of that id are "
                    "not supported"
                )
            return "I2_S", n // 4 + 32
        if type_id == _TL1:
            return "TL1", 0
        if type_id == _TL2 and not fills(n // block * size):
            return "TL2", 0
        if not size:
            raise UnsupportedError(f"tensor {name} has the unknown type {type_id}")
        if shape[-1] % block:
            raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
        if name_of == "Q8_1":
            sizes = [nbytes for nbytes in _Q8_1_NBYTES if fills(n // block * nbytes)]
            if len(sizes) != 1:
                raise UnsupportedError(
                    f"tensor {name} Q8_1 {list(shape)} takes {room} bytes: its blocks must have 36 "
                    "bytes, or 40 as in old files, and it must show which"
                )
            size = sizes[0]
        return name_of, n // block * size


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
