"""Text to token ids and back, from the tokenizer files that a .lut carries."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tmac_py.errors import ModelFileError, TmacError
from tmac_py.tokenizer_backends import open_backend


class Tokenizer:
    """The vocabulary of one model.

    Args:
        files: file name -> content: "tokenizer.json" (preferred) or "tokenizer.model", and
            optionally "tokenizer_config.json" (``add_bos_token``, ``bos_token``, ``eos_token``,
            ``legacy``, ``added_tokens_decoder`` as transformers writes them).
        bos_id: id of the begin-of-text token where the files name none (``bos_token``).

    Attributes:
        bos_id, bos_token, eos_token: the begin- and end-of-text tokens, None where there is none.

    Text starts with the begin-of-text token if ``add_bos_token`` says so. Where that is not given,
    a tokenizer.json has a rule of its own, and with a tokenizer.model text does.

    Raises:
        ModelFileError: a file is missing or cannot be read.
        UnsupportedError: the vocabulary is of a kind that is not supported.

    An instance is immutable and may be used from several threads.
    """

    def __init__(self, files: Mapping[str, bytes], *, bos_id: int | None = None) -> None:
        self.config = _read_config(files)
        self._backend = open_backend(files, self.config)
        self.bos_token = _token_text(self.config.get("bos_token"))
        self.eos_token = _token_text(self.config.get("eos_token"))
        prefix = self._backend.own_prefix()
        named = None if self.bos_token is None else self._backend.id_of(self.bos_token)
        if named is not None:
            bos_id = named
        elif bos_id is None and prefix:
            bos_id = prefix[0]
        self.bos_id = bos_id
        if self.bos_token is None and bos_id is not None:
            self.bos_token = self._backend.piece(bos_id)
        rule = self.config.get("add_bos_token")
        if isinstance(rule, bool) or prefix is None:
            prefix = [] if rule is False or bos_id is None else [bos_id]
        self._prefix = prefix

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included. The model's own may be padded to more."""
        return self._backend.size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text: begin, end, the marks of a chat."""
        return self._backend.special_ids

    def id_of(self, token: str) -> int | None:
        """The id of one token as the vocabulary writes it (``"<|im_end|>"``), or None."""
        return self._backend.id_of(token)

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, or None for an id it does not have."""
        return self._backend.piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: not always whole characters, empty for an unknown id."""
        return self._backend.bytes_of(token_id)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: any text; the empty text has no tokens of its own.
            add_special: put the begin-of-text token in front where the model wants one. It is never
                put there twice: a text that already begins with it keeps the one it has. No end
                token is added.
            parse_special: read marks such as ``<|im_end|>`` in the text as special tokens; False
                encodes them as the characters they are made of.

        Raises:
            TmacError: the text holds half of a surrogate pair, which no UTF-8 text can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TmacError(
                f"the text is not valid Unicode: character {error.start} is "
                f"U+{ord(text[error.start]):04X}, half of a surrogate pair"
            ) from error
        ids = self._backend.encode(text, parse_special=parse_special)
        if not add_special or ids[: len(self._prefix)] == self._prefix:
            return ids
        return self._prefix + ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, special tokens are left out."""
        decoder = IncrementalDecoder(self, skip_special=skip_special, trim_space=True)
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    @property
    def drops_first_space(self) -> bool:
        """True when the first space of a decoded text belongs to the encoding (SentencePiece)."""
        return self._backend.drops_first_space


class IncrementalDecoder:
    """Token ids to text, one at a time, in whole characters.

    Args:
        tokenizer: the vocabulary.
        skip_special: leave special tokens out of the text.
        trim_space: drop the one space with which SentencePiece vocabularies begin a text. Wanted
            for a text of its own; not wanted for text that continues another.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, trim_space: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._trim = trim_space and tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes: empty while a character is still missing bytes."""
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._trim and data:
            data = data.removeprefix(b" ")
            self._trim = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End of the text: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


def _read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise ModelFileError(f"tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelFileError("tokenizer_config.json must hold an object")
    return config


def _token_text(token: object) -> str | None:
    """A special token of tokenizer_config.json: a text, or an object with the text in it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
