"""The two libraries behind :class:`tmac_py.tokenizer.Tokenizer`, brought to one small interface.

A token is a run of bytes. Both kinds of vocabulary that decoders of the Llama family use
(byte-level BPE and SentencePiece with byte fallback) say for each token alone which bytes it stands
for, so text is decoded by joining bytes.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tmac_py.errors import ModelFileError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

_SPACE_MARK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""``normalizer_spec { add_dummy_prefix: false }``: protobuf merges concatenated messages."""


class Backend(Protocol):
    """What a vocabulary must do: text to ids, and for each id its bytes and its kind."""

    @property
    def size(self) -> int:
        """Number of ids, added tokens included: every valid id is below it."""

    @property
    def drops_first_space(self) -> bool:
        """True when the first space of a decoded text belongs to the encoding, not to the text."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that structure text and are not part of it (begin, end, chat marks)."""

    def own_prefix(self) -> list[int] | None:
        """Ids that the file itself wants before a text; None where it does not say, meaning BOS."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of ``text``, nothing added."""

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, or None for an id it does not have."""

    def id_of(self, piece: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes the token stands for; empty for an id the vocabulary does not have."""


class _JsonBackend:
    """A tokenizer.json, read by the ``tokenizers`` library."""

    def __init__(self, data: bytes) -> None:
        self._tokenizer = _load(data)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = max([self._tokenizer.get_vocab_size(), *(i + 1 for i in added)])
        steps = _decoder_steps(self._tokenizer.decoder)
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise UnsupportedError(
                f"tokenizer.json: decoder {sorted(kinds) or 'missing'} is not supported; "
                "allowed: ByteLevel, Metaspace, ByteFallback"
            )
        self.drops_first_space = any(
            (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            or (step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
            for step in steps
        )

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second instance that treats the marks of special tokens as ordinary text."""
        tokenizer = _load(self._tokenizer.to_str().encode())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def own_prefix(self) -> list[int]:
        try:
            whole: list[int] = self._tokenizer.encode("a").ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust; it cannot be imported
                raise
            raise ModelFileError(f"tokenizer.json cannot be used: {error}") from None
        text = self.encode("a", parse_special=True)
        ends = range(len(whole) - len(text) + 1)
        return next((whole[:i] for i in ends if whole[i : i + len(text)] == text), [])

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        tokenizer = self._tokenizer if parse_special else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> str | None:
        piece: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return piece

    def id_of(self, piece: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(piece)
        return token_id

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(piece)
        if token_id in self.special_ids:
            return piece.encode()
        return _sentencepiece_bytes(piece)


class _SentencePieceBackend:
    """A tokenizer.model, read by the ``sentencepiece`` library.

    The library knows no special tokens in text: text is split at them here. With ``legacy`` (the
    rule of Llama 2) each part gets the space that SentencePiece puts before a text, otherwise the
    first part alone does.
    """

    def __init__(self, data: bytes, *, added: dict[str, int], legacy: bool) -> None:
        import sentencepiece  # most models have a tokenizer.json

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._unprefixed = sentencepiece.SentencePieceProcessor(
                model_proto=data + _NO_DUMMY_PREFIX
            )
        except RuntimeError as error:
            raise ModelFileError(f"tokenizer.model cannot be read: {error}") from error
        n_pieces: int = self._model.vocab_size()
        pieces = (self._model.id_to_piece(i) for i in range(n_pieces))
        self._marks = {
            piece: i
            for i, piece in enumerate(pieces)
            if self._model.is_control(i) or self._model.is_unknown(i)
        } | added
        self._added = {i: piece for piece, i in added.items()}
        self._legacy = legacy
        self.size = max([n_pieces, *(i + 1 for i in self._added)])
        self.special_ids = frozenset(self._marks.values())
        self.drops_first_space = self._model.encode("a") != self._unprefixed.encode("a")
        longest_first = sorted(filter(None, self._marks), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def own_prefix(self) -> None:
        return None

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(self._model.encode(text))
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._marks[part])
            elif part:
                prefixed = i == 0 or self._legacy
                ids += (self._model if prefixed else self._unprefixed).encode(part)
        return ids

    def piece(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id]
        if not 0 <= token_id < self._model.vocab_size():
            return None
        piece: str = self._model.id_to_piece(token_id)
        return piece

    def id_of(self, piece: str) -> int | None:
        if piece in self._marks:
            return self._marks[piece]
        token_id: int = self._model.piece_to_id(piece)
        return None if self._model.is_unknown(token_id) else token_id

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        return piece.encode() if token_id in self.special_ids else _sentencepiece_bytes(piece)


def open_backend(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Backend:
    """The vocabulary in a model's tokenizer files (see :class:`tmac_py.tokenizer.Tokenizer`)."""
    if "tokenizer.json" in files:
        return _JsonBackend(files["tokenizer.json"])
    if "tokenizer.model" in files:
        legacy = config.get("legacy") is not False
        return _SentencePieceBackend(
            files["tokenizer.model"], added=_added_tokens(config), legacy=legacy
        )
    raise ModelFileError("the model carries no tokenizer: tokenizer.json or tokenizer.model")


def _load(data: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise ModelFileError(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _return_freed_memory()
    return tokenizer


def _return_freed_memory() -> None:
    """Give the system what parsing took and glibc keeps: 6 MB after a vocabulary of 49 152."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _added_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    """``added_tokens_decoder`` of tokenizer_config.json as text -> id."""
    try:
        entries = config.get("added_tokens_decoder", {}).items()
        return {str(token["content"]): int(i) for i, token in entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError("tokenizer_config.json: added_tokens_decoder is malformed") from error


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoder of a tokenizer.json as a flat list of its steps."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    try:
        return bytes([alphabet[char] for char in piece])
    except KeyError:  # an added token, stored as plain text
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPACE_MARK, " ").encode()
