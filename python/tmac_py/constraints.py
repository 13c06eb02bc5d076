"""Answers of a given form: tokens that would leave a JSON schema, regex or grammar are forbidden.

Through llguidance, an extra. Without it an answer that has to have a form is refused: one of any
other form would be worse than none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tmac_py.config import ModelConfig
from tmac_py.errors import OptionError, TmacError
from tmac_py.sampling import Ids, Logits, LogitsProcessor
from tmac_py.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r"[ \t\n]{0,20}"
"""Between the parts of JSON: small models would go on with blanks for ever."""

FORMS = ("json_schema", "regex", "grammar")
"""Options that give an answer a form."""


@dataclass(frozen=True)
class Form:
    """What an answer has to be.

    Attributes:
        kind: "json_schema", "regex" (Rust's syntax, the whole answer) or "grammar" (Lark).
        source: its text.
        option: what errors call it.
    """

    kind: Literal["json_schema", "regex", "grammar"]
    source: str
    option: str


def read_form(options: Mapping[str, Any]) -> Form | None:
    """The one of FORMS among ``options``, None if there is none; OptionError for several."""
    given = [name for name in FORMS if options.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise OptionError(f"{given[0]} and {given[1]} together; allowed: one of {', '.join(FORMS)}")
    name = given[0]
    value = options[name]
    if name == "json_schema":
        return schema_form(value, name)
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {value!r}; allowed: a text of at least one character")
    return Form("regex" if name == "regex" else "grammar", value, name)


def schema_form(schema: object, option: str) -> Form:
    """That of a JSON schema: an object, or JSON text of one."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{option} is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise OptionError(f"{option} is {schema!r}; allowed: an object, or JSON text of one")
    try:
        return Form("json_schema", json.dumps(schema), option)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{option} is not JSON: {error}") from error


def response_form(response_format: object) -> Form | None:
    """That of OpenAI's ``response_format``; None for free text."""
    option = "response_format"
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise OptionError(f"{option}: allowed: an object with a type")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    elif kind == "json_schema":
        named = response_format.get("json_schema")
        schema = named.get("schema") if isinstance(named, Mapping) else None
    else:
        raise OptionError(
            f"{option}.type is {kind!r}; allowed: 'text', 'json_object', 'json_schema'"
        )
    if not isinstance(schema, Mapping):
        raise OptionError(f"{option}: {kind} without a schema")
    return schema_form(schema, option)


class Constraints:
    """Makes processors of forms for one vocabulary. May be used by any thread."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._opened: LLTokenizer | None = None
        self._lock = threading.Lock()

    def processor(self, form: Form, n_prompt: int) -> LogitsProcessor:
        """What keeps an answer to ``n_prompt`` tokens in the form; for one answer.

        Raises OptionError: the form is not valid or not supported, or llguidance is missing.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise OptionError(
                f"{form.option} needs llguidance, which is not installed "
                "(pip install 'tmac_py[grammar]')"
            ) from None
        if not self._config.eos_token_ids:
            raise OptionError(f"{form.option} needs a model with an end token; this one has none")
        try:
            if form.kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(
                    form.source, overrides={"whitespace_pattern": WHITESPACE}
                )
            elif form.kind == "regex":
                grammar = LLMatcher.grammar_from_regex(form.source)
            else:
                grammar = LLMatcher.grammar_from_lark(form.source)
            matcher = LLMatcher(self._open_tokenizer(), grammar, log_level=0)
            matcher.compute_bitmask()  # some limits are met only here
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            what = {"json_schema": "schema"}.get(form.kind, form.kind)
            raise OptionError(f"{form.option}: this {what} is not supported: {_summary(problem)}")
        return _Follower(matcher, n_prompt, form.option)

    def _open_tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it, made once."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._opened is None:
                self._opened = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(self._tokenizer, self._config)),
                    n_vocab=self._config.vocab_size,
                    eos_token=list(self._config.eos_token_ids),
                )
            return self._opened


def _summary(problem: str) -> str:
    """The first line of what llguidance says, and the reason where that stands in a later one."""
    first, *others = problem.strip().splitlines()
    return " ".join([first, *(line for line in others if line.startswith("error: "))])


class _Vocabulary:
    """What llguidance reads of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        special = tokenizer.special_ids
        self.eos_token_id = config.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(special)
        self.tokens = [
            (tokenizer.piece(i) or "").encode() if i in special else tokenizer.token_bytes(i)
            for i in range(config.vocab_size)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special=False, parse_special=False)


class _Follower:
    """A processor that forbids what the grammar does not allow next."""

    def __init__(self, matcher: LLMatcher, n_prompt: int, option: str) -> None:
        self._matcher = matcher
        self._known = n_prompt
        self._option = option

    def __call__(self, ids: Ids, logits: Logits) -> None:
        matcher = self._matcher
        matcher.consume_tokens(ids[self._known :].tolist())
        self._known = len(ids)
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise TmacError(f"{self._option}: {_summary(matcher.get_error())}")
        allowed = np.unpackbits(mask, count=len(logits), bitorder="little")
        logits[allowed == 0] = -np.inf
