"""Saved sessions: a safetensors file with the tokens of a text, their keys and values, a note."""

from __future__ import annotations

import json
import os
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from tmac_py.decoding import Ids
from tmac_py.errors import ModelFileError

_FORMAT = "tmac-session-2"
_MAX_HEADER_BYTES = 1 << 16
_PARTS = ("ids", "state", "note")

State = NDArray[np.uint8]


def write_session(
    path: Path, fingerprint: str, kv: str, ids: Ids, state: State, note: str = ""
) -> None:
    """Write ``ids`` int32 [n] and ``state`` uint8 (of the core's KvCache) to ``path``, or nothing.

    ``fingerprint`` is the model's. Raises OSError.
    """
    middle, end = 4 * len(ids), 4 * len(ids) + len(state)
    data = ids.astype("<i4").tobytes() + state.tobytes() + note.encode()
    header = {
        "__metadata__": {
            "format": _FORMAT,
            "model": fingerprint,
            "kv": kv,
            "xxh3": xxhash.xxh3_128_hexdigest(data),
        },
        "ids": _tensor("I32", len(ids), 0, middle),
        "state": _tensor("U8", len(state), middle, end),
        "note": _tensor("U8", len(data) - end, end, len(data)),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text + data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_session(path: Path, fingerprint: str) -> tuple[str, Ids, State, str]:
    """The type of KV cache, ids int32 [n], state uint8 and the note that were saved.

    Raises ModelFileError, naming the file, if it is missing, damaged, or of another model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    length = int.from_bytes(content[:8], "little")
    try:
        if length > _MAX_HEADER_BYTES:
            raise ValueError
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        metadata = header["__metadata__"]
        if metadata["format"] != _FORMAT:
            raise ModelFileError(f"{path}: format {metadata['format']!r}; allowed: {_FORMAT!r}")
        data = content[8 + length :]
        middle, state_end, end = (index(header[name]["data_offsets"][1]) for name in _PARTS)
        if middle % 4 or sorted([0, middle, state_end, end]) != [0, middle, state_end, end]:
            raise ValueError
        kv, model, checksum = metadata["kv"], metadata["model"], metadata["xxh3"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ModelFileError(f"{path}: not a saved session ({_FORMAT})") from None
    if len(data) != end or xxhash.xxh3_128_hexdigest(data) != checksum:
        raise ModelFileError(f"{path}: the file is damaged: it does not match its checksum")
    if model != fingerprint:
        raise ModelFileError(f"{path}: saved with another model")
    ids, state = (
        np.frombuffer(data[:middle], "<i4"),
        np.frombuffer(data[middle:state_end], np.uint8),
    )
    return kv, ids, state, data[state_end:].decode(errors="replace")


def _tensor(dtype: str, size: int, start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [size], "data_offsets": [start, end]}
