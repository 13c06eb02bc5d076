"""Answers that are JSON, or JSON of a schema: tokens that would lead elsewhere are forbidden.

Through llguidance, an extra. Without it such requests fail: an answer of any other form would be
worse than none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tmac_py.errors import TmacError
from tmac_py.sampling import Ids, Logits, LogitsProcessor
from tmac_py.server.errors import invalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tmac_py.model import Model

WHITESPACE = r"[ \t\n]{0,20}"
"""Between the parts of JSON: small models would go on with blanks for ever."""


class Constraints:
    """Makes processors of OpenAI's ``response_format`` for one model. May be used by any thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def processor(self, response_format: object, n_prompt: int) -> LogitsProcessor | None:
        """What keeps an answer to ``n_prompt`` tokens in the form; None if any will do.

        Raises ApiError: the form is not allowed or not supported, or llguidance is missing.
        """
        schema = _schema(response_format)
        if schema is None:
            return None
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise invalid(
                "response_format needs llguidance, which is not installed "
                "(pip install 'tmac_py[grammar]')",
                "response_format",
            ) from None
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": WHITESPACE}
            )
            matcher = LLMatcher(self._open_tokenizer(), grammar, log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            first = problem.strip().splitlines()[0]
            raise invalid(
                f"response_format: this schema is not supported: {first}", "response_format"
            )
        return _Follower(matcher, n_prompt)

    def _open_tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it, made once."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._tokenizer is None:
                config = self._model.config
                self._tokenizer = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(self._model)),
                    n_vocab=config.vocab_size,
                    eos_token=list(config.eos_token_ids),
                )
            return self._tokenizer


class _Vocabulary:
    """What llguidance reads of a tokenizer."""

    def __init__(self, model: Model) -> None:
        tokenizer = model.tokenizer
        special = tokenizer.special_ids
        self.eos_token_id = model.config.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(special)
        self.tokens = [
            (tokenizer.piece(i) or "").encode() if i in special else tokenizer.token_bytes(i)
            for i in range(model.config.vocab_size)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special=False, parse_special=False)


class _Follower:
    """A processor that forbids what the grammar does not allow next."""

    def __init__(self, matcher: LLMatcher, n_prompt: int) -> None:
        self._matcher = matcher
        self._known = n_prompt

    def __call__(self, ids: Ids, logits: Logits) -> None:
        matcher = self._matcher
        matcher.consume_tokens(ids[self._known :].tolist())
        self._known = len(ids)
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise TmacError(f"response_format: {matcher.get_error().splitlines()[0]}")
        allowed = np.unpackbits(mask, count=len(logits), bitorder="little")
        logits[allowed == 0] = -np.inf


def _schema(response_format: object) -> str | None:
    """The JSON schema that is asked for, as text; None for free text."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise invalid("response_format: allowed: an object with a type", "response_format")
    kind = response_format.get("type")
    schema: Any
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    elif kind == "json_schema":
        named = response_format.get("json_schema")
        schema = named.get("schema") if isinstance(named, Mapping) else None
    else:
        raise invalid(
            f"response_format.type is {kind!r}; allowed: 'text', 'json_object', 'json_schema'",
            "response_format",
        )
    if not isinstance(schema, Mapping):
        raise invalid(f"response_format: {kind} without a schema", "response_format")
    return json.dumps(schema)
