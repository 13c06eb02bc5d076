"""Writing a SentencePiece model file (a protocol buffer) without the protobuf package.

Field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

_BPE = 2  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """One entry of the vocabulary; ``type`` as SentencePiece numbers it (1 normal ... 6 byte)."""

    text: str
    score: float
    type: int


def serialize_bpe(
    pieces: Iterable[Piece],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    unk_id: int,
    bos_id: int | None,
    eos_id: int | None,
) -> bytes:
    """A tokenizer.model with a BPE vocabulary, byte fallback and no text normalisation."""
    entries = list(pieces)
    out = bytearray()
    for piece in entries:
        out += _bytes(
            1,
            _bytes(1, piece.text.encode())
            + _tag(2, 5)
            + struct.pack("<f", piece.score)
            + _integer(3, int(piece.type)),
        )
    special = ((40, unk_id), (41, bos_id), (42, eos_id), (43, None))  # unk, bos, eos, pad
    out += _bytes(
        2,  # TrainerSpec
        _integer(3, _BPE)
        + _integer(4, len(entries))
        + _integer(35, 1)  # byte_fallback
        + b"".join(_integer(field, -1 if value is None else value) for field, value in special)
        + b"".join(
            _bytes(field, entries[value].text.encode())
            for field, value in ((45, unk_id), (46, bos_id), (47, eos_id))
            if value is not None
        ),
    )
    out += _bytes(
        3,  # NormalizerSpec
        _bytes(1, b"identity")
        + _bytes(2, b"")
        + _integer(3, int(add_dummy_prefix))
        + _integer(4, int(remove_extra_whitespaces))
        + _integer(5, 1),  # escape_whitespaces
    )
    return bytes(out)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are sign-extended to 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content
