"""The header of a .lut file: what it says, and the checks on it (docs/lut-format.md)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import xxhash

from tmac_py.config import ModelConfig, is_matrix
from tmac_py.errors import ModelFileError, TmacError
from tmac_py.quant import MAX_BCQ_BITS, MAX_BITS
from tmac_py.spec import LAYOUTS, LinearSpec, OffsetKind

FORMAT_VERSION = 2
"""The newest version that is read. Files are written in the oldest that can hold them: 2 if a
matrix has an order, else 1."""

ALIGNMENT = 64
TOKENIZER_PREFIX = "tokenizer/"
WEIGHT_SUFFIX = ".weight"
ORDER_SUFFIX = ".order"
MAX_HEADER_BYTES = 100_000_000  # the safetensors limit

_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
_NO_CHECKSUM = "0" * 32
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9]{1,9}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_METADATA_KEYS = ("tmac.config", "tmac.tensors", "tmac.source", "tmac.header")
ROW_TILE = 32
"""Rows of a packed matrix that lie together."""
_CHUNK = 8
_TERNARY_CHUNK = 24

TensorKind = Literal["linear", "order", "float", "file"]

_DTYPES: dict[TensorKind, str] = {"linear": "U8", "order": "I32", "float": "F32", "file": "U8"}
_ITEM_BYTES = {"U8": 1, "I32": 4, "F32": 4}
_UNORDERED = "model.embed_tokens.weight"
"""A matrix whose rows are read, not multiplied."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: packed matrix, its order, float32 array, or bytes of a tokenizer file.

    ``shape`` is ``(m, k)`` for a packed matrix, ``start`` counts bytes from the start of the data.
    """

    name: str
    kind: TensorKind
    shape: tuple[int, ...]
    start: int
    nbytes: int
    xxh3: str
    spec: LinearSpec | None = None


@dataclass(frozen=True)
class Header:
    """A parsed and checked header; ``data_start`` is the offset of the data in the file."""

    config: ModelConfig
    source: dict[str, str]
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]
    data_start: int


def packed_nbytes(spec: LinearSpec) -> int:
    """Bytes of a packed matrix."""
    full_groups, ragged = divmod(spec.k, spec.group_size)
    n_groups = full_groups + (ragged > 0)
    scales = 0 if spec.scale is not None else spec.bits if spec.encoding == "bcq" else 1
    constants = scales + (spec.offset_kind != "none")
    codes = full_groups * _row_bytes(spec, spec.group_size) + _row_bytes(spec, ragged)
    tile = codes * ROW_TILE + n_groups * constants * 2 * ROW_TILE
    padding = 0 if spec.scale is None else ALIGNMENT
    return -(-spec.m // ROW_TILE) * _round_up(tile) + padding


def _row_bytes(spec: LinearSpec, n: int) -> int:
    """Bytes that the codes of a row take in a group of n weights."""
    if spec.encoding != "ternary":
        return -(-n // _CHUNK) * spec.bits
    full, rest = divmod(n, _TERNARY_CHUNK)
    return full * (1 + _TERNARY_CHUNK // 6) + (1 + max(2, -(-rest // 6)) if rest else 0)


def check_spec(spec: LinearSpec) -> None:
    """Raise ModelFileError, naming the field, unless ``spec`` is one that this version can hold."""
    if spec.layout not in LAYOUTS.values():
        known = ", ".join(LAYOUTS.values())
        raise ModelFileError(f"layout {spec.layout!r} is not known ({known})")
    for field, value in (("m", spec.m), ("k", spec.k), ("group_size", spec.group_size)):
        if not _is_count(value) or not 1 <= value < 2**31:
            raise ModelFileError(f"{field} must be a positive integer, found {value!r}")
    if not _is_count(spec.bits) or not 1 <= spec.bits <= MAX_BITS:
        raise ModelFileError(f"bits must be 1 to {MAX_BITS}, found {spec.bits!r}")
    if spec.group_size != spec.k and spec.group_size % 4:
        raise ModelFileError(
            f"group_size must be a multiple of 4, or k ({spec.k}), found {spec.group_size}"
        )
    if spec.offset_kind not in get_args(OffsetKind):
        raise ModelFileError(
            f"offset_kind must be none, offset or zero, found {spec.offset_kind!r}"
        )
    if not isinstance(spec.zero, float) or not math.isfinite(spec.zero):
        raise ModelFileError(f"zero must be a finite number, found {spec.zero!r}")
    if spec.encoding == "ternary" and (spec.bits, spec.offset_kind, spec.zero) != (2, "none", 1):
        raise ModelFileError(
            f"layout {spec.layout} needs bits 2, offset_kind none and zero 1, "
            f"found {spec.bits}, {spec.offset_kind} and {spec.zero}"
        )
    if spec.encoding == "bcq" and (
        spec.bits > MAX_BCQ_BITS or (spec.offset_kind, spec.zero) != ("offset", 0)
    ):
        raise ModelFileError(
            f"layout {spec.layout} needs bits 1 to {MAX_BCQ_BITS}, offset_kind offset and zero 0, "
            f"found {spec.bits}, {spec.offset_kind} and {spec.zero}"
        )
    if spec.scale is not None:
        if not isinstance(spec.scale, float) or not abs(spec.scale) <= _FLOAT32_MAX:
            raise ModelFileError(f"scale must be a finite number such as 0.5, found {spec.scale!r}")
        if spec.encoding != "ternary" or spec.group_size != spec.k:
            raise ModelFileError("scale needs a ternary layout, and group_size k")


def check_shapes(config: ModelConfig, entries: Iterable[TensorEntry]) -> None:
    """Raise one ModelFileError that lists every missing, unexpected or mis-shaped tensor."""
    expected = config.tensor_shapes()
    found = {entry.name: entry for entry in entries if entry.kind != "file"}
    for name, entry in found.items():
        matrix = matrix_of(name)
        shape = expected.get(matrix, ())
        if entry.kind == "order" and is_matrix(matrix, shape) and matrix != _UNORDERED:
            expected[name] = shape[1:]
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(entry.shape)} (must be {list(expected[name])})"
        for name, entry in found.items()
        if name in expected
        and (
            entry.shape != expected[name]
            or (entry.kind == "linear") != is_matrix(name, entry.shape)
        )
    ]
    parts = [
        f"{what} {_listing(names)}"
        for what, names in (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
        if names
    ]
    if parts:
        raise ModelFileError(f"tensors do not match the configuration: {'; '.join(parts)}")


def order_of(matrix: str) -> str:
    """Name of the tensor that holds the order of a packed matrix."""
    return matrix.removesuffix(WEIGHT_SUFFIX) + ORDER_SUFFIX


def matrix_of(order: str) -> str:
    """The inverse of `order_of`."""
    return order.removesuffix(ORDER_SUFFIX) + WEIGHT_SUFFIX


def check_file_name(name: str) -> None:
    """Raise ModelFileError unless ``name`` may name a tokenizer file."""
    if not _FILE_NAME.fullmatch(name):
        raise ModelFileError(f"{name!r} is not a tokenizer file name (letters, digits, . _ -)")


def build_header(
    config: ModelConfig, source: Mapping[str, str], entries: Iterable[TensorEntry], size: int = 0
) -> bytes:
    """Length and JSON, padded with spaces to at least ``size`` bytes and a multiple of 64."""
    tensors: dict[str, dict[str, Any]] = {}
    version = 1
    header: dict[str, Any] = {"__metadata__": {}}
    for entry in entries:
        tensors[entry.name] = {**_describe(entry.spec), "xxh3": entry.xxh3}
        version = 2 if entry.kind == "order" else version
        bytes_only = _DTYPES[entry.kind] == "U8"
        header[entry.name] = {
            "dtype": _DTYPES[entry.kind],
            "shape": [entry.nbytes] if bytes_only else list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.nbytes],
        }
    header["__metadata__"] = {
        "tmac.format": str(version),
        "tmac.config": _dump(config.to_dict()),
        "tmac.tensors": _dump(tensors),
        "tmac.source": _dump(dict(source)),
        "tmac.header": _NO_CHECKSUM,
    }
    text = _dump(header).encode()
    total = max(_round_up(8 + len(text)), size)
    text = text.ljust(total - 8)
    slot = text.index(b'"tmac.header":"') + len(b'"tmac.header":"')
    text = text[:slot] + xxhash.xxh3_128_hexdigest(text).encode() + text[slot + 32 :]
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes, *, data_bytes: int) -> Header:
    """Read and check the JSON of a header (without its 8-byte length).

    ``data_bytes`` is what the file holds after it. Raises ModelFileError or UnsupportedError; the
    text does not name the file.
    """
    header = _load(text, "the header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or "tmac.format" not in metadata:
        raise ModelFileError(
            "a safetensors file, but not a .lut; convert a checkpoint with tmac-convert"
        )
    _check_version(metadata["tmac.format"])
    for key in _METADATA_KEYS:
        if not isinstance(metadata.get(key), str):
            raise ModelFileError(f"the header lacks {key}")
    _check_header_checksum(text, metadata["tmac.header"])
    config = ModelConfig.from_dict(_load(metadata["tmac.config"].encode(), "tmac.config"))
    source = _load(metadata["tmac.source"].encode(), "tmac.source")
    if not all(isinstance(value, str) for value in source.values()):
        raise ModelFileError("tmac.source must hold strings")
    described = _load(metadata["tmac.tensors"].encode(), "tmac.tensors")
    if set(described) != set(header):
        names = _listing(sorted(set(described) ^ set(header)))
        raise ModelFileError(f"header and tmac.tensors disagree about {names}")
    entries = [_parse_entry(name, info, described[name]) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_placement(entries, data_bytes)
    check_shapes(config, entries)
    return Header(
        config=config,
        source=source,
        metadata=metadata,
        entries={entry.name: entry for entry in entries},
        data_start=8 + len(text),
    )


def _check_version(version: object) -> None:
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ModelFileError(f"format version {str(version)[:20]!r} is not a number")
    if int(version) > FORMAT_VERSION:
        raise ModelFileError(
            f"written in format version {version}, newer than version {FORMAT_VERSION} that this "
            "tmac_py reads; upgrade tmac_py"
        )
    if int(version) < 1:
        raise ModelFileError(f"format version {version} does not exist")


def _check_header_checksum(text: bytes, checksum: str) -> None:
    stored = checksum.encode()
    if not _CHECKSUM.fullmatch(checksum) or text.count(stored) != 1:
        raise ModelFileError("the header's checksum is not readable: the file was altered")
    blank = text.replace(stored, _NO_CHECKSUM.encode())
    if xxhash.xxh3_128_hexdigest(blank) != checksum:
        raise ModelFileError("the header does not match its checksum: the file was altered")


def _parse_entry(name: str, info: object, described: object) -> TensorEntry:
    """One tensor from its safetensors entry and its entry in "tmac.tensors"."""
    try:
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise ModelFileError("its entry must hold dtype, shape and data_offsets")
        if not isinstance(described, dict) or not _CHECKSUM.fullmatch(
            str(described.get("xxh3", ""))
        ):
            raise ModelFileError("xxh3 must be 32 hexadecimal digits")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            raise ModelFileError("shape and data_offsets must be lists of non-negative integers")
        fields = {key: value for key, value in described.items() if key != "xxh3"}
        start, nbytes = offsets[0], offsets[1] - offsets[0]
        spec = None
        kind: TensorKind
        if name.startswith(TOKENIZER_PREFIX):
            kind = "file"
            check_file_name(name[len(TOKENIZER_PREFIX) :])
        elif name.endswith(ORDER_SUFFIX):
            kind = "order"
        elif dtype == "F32":
            kind = "float"
        else:
            kind = "linear"
            spec = _parse_spec(fields)
            fields = {}
            if nbytes != packed_nbytes(spec):
                raise ModelFileError(f"holds {nbytes} bytes, must hold {packed_nbytes(spec)}")
        if fields:
            raise ModelFileError(f"unknown key {', '.join(fields)}")
        if dtype != _DTYPES[kind]:
            raise ModelFileError(
                f"dtype {dtype!r} is not allowed here (U8, I32 for orders, or F32 for norms)"
            )
        item = _ITEM_BYTES[dtype]
        if math.prod(shape) * item != nbytes or (kind != "float" and len(shape) != 1):
            raise ModelFileError(f"shape {shape} does not agree with its {nbytes} bytes")
        if start % (ALIGNMENT if kind == "linear" else item):
            raise ModelFileError(f"starts at byte {start}, which is not aligned")
    except TmacError as error:
        raise type(error)(f"tensor {name}: {error}") from None
    return TensorEntry(
        name=name,
        kind=kind,
        shape=(spec.m, spec.k) if spec else tuple(shape),
        start=start,
        nbytes=nbytes,
        xxh3=described["xxh3"],
        spec=spec,
    )


def _describe(spec: LinearSpec | None) -> dict[str, Any]:
    fields = {} if spec is None else asdict(spec)
    return {key: value for key, value in fields.items() if value is not None}


def _parse_spec(fields: Mapping[str, Any]) -> LinearSpec:
    names = set(LinearSpec.__dataclass_fields__) - {"scale"}
    if set(fields) - {"scale"} != names:
        raise ModelFileError(f"tmac.tensors must hold exactly {', '.join(sorted(names))} and xxh3")
    spec = LinearSpec(**fields)
    check_spec(spec)
    return spec


def _check_placement(entries: list[TensorEntry], data_bytes: int) -> None:
    """Tensors follow each other without gaps and fill the file."""
    end = 0
    for entry in entries:
        if entry.start != end or entry.nbytes < 0:
            raise ModelFileError(f"tensor {entry.name} starts at byte {entry.start}, not {end}")
        end += entry.nbytes
    if data_bytes < end:
        raise ModelFileError(
            f"truncated: the tensors take {end:,} bytes, the file has {data_bytes:,} of them"
        )
    if data_bytes > end:
        raise ModelFileError(f"longer than the header says (excess bytes: {data_bytes - end:,})")


def _load(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key stands twice")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise ModelFileError(f"{what} is not readable JSON: the file was altered") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is not a JSON object: the file was altered")
    return value


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _listing(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(item) and item >= 0 for item in value)
