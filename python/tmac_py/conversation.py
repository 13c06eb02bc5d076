"""A text in turns, of which a session holds what was computed: chats, and texts continued."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmac_py.errors import ModelFileError, TmacError
from tmac_py.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tmac_py.generate import Token
    from tmac_py.model import Model
    from tmac_py.options import GenerationOptions

_ANSWER_ROOM = 256
"""Tokens that an answer should have room for, within a quarter of the context."""


class Conversation(ABC):
    """What chats and continued texts have in common; one thread at a time uses it.

    Attributes:
        session: holds what was computed, so that a turn costs its own tokens only.
        dropped: turns, or tokens of a text, that the last prompt left out to fit the context.
    """

    unit: str
    """What ``dropped`` counts."""

    def __init__(self, model: Model, session: Session | None = None) -> None:
        """Goes on with ``session``'s computed tokens where the text begins like them."""
        self._model = model
        self.session = model.new_session() if session is None else session
        self.dropped = 0

    @abstractmethod
    def stream(
        self, text: str, **options: Unpack[GenerationOptions]
    ) -> Generator[Token, None, None]:
        """Say ``text`` and generate what follows, as ``Session.stream`` does.

        What does not fit the context any more is left out, oldest first, with so much more that
        some turns fit again. When the generator is closed early, what came counts as the answer;
        before the first token nothing changes.

        Raises:
            ContextError: ``text`` alone does not fit.
            OptionError: an option is not allowed.
            TmacError: the chat template refuses the messages.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget what was said."""

    @abstractmethod
    def _note(self) -> dict[str, Any]:
        """What was said, as JSON."""

    @abstractmethod
    def _restore(self, note: dict[str, Any]) -> bool:
        """Take what ``_note`` gave; False, without a change, for anything else."""

    def save(self, path: str | Path) -> None:
        """Write what was said and what was computed to a file. Raises OSError."""
        self.session.note = json.dumps(self._note(), ensure_ascii=False)
        self.session.save(path)

    def load(self, path: str | Path) -> None:
        """Go on where :meth:`save` was called.

        Raises:
            ModelFileError: the file is missing, damaged, of another model, or no conversation.
            ContextError: it holds more than this context does.
        """
        session = Session.load(self._model, path, n_ctx=self.session.n_ctx)
        try:
            note = json.loads(session.note or "null")
        except ValueError:
            note = None
        if not isinstance(note, dict) or not self._restore(note):
            raise ModelFileError(f"{path}: holds no {type(self).__name__.lower()}, only its tokens")
        self.session, self.dropped = session, 0

    def _answer_room(self, options: GenerationOptions) -> int:
        wanted = options.get("max_tokens")
        room = min(_ANSWER_ROOM, self.session.n_ctx // 4)
        return room if wanted is None or wanted < 1 else min(room, wanted)


class Chat(Conversation):
    """Messages by the model's chat template.

    Attributes:
        messages: all turns that count, a system message first if there is one.
    """

    unit = "turn"

    def __init__(
        self,
        model: Model,
        session: Session | None = None,
        *,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """``variables`` are more names for the template.

        TmacError for a model without a template, and one that refuses a system message.
        """
        super().__init__(model, session)
        self._variables = dict(variables or {})
        self.messages: list[dict[str, str]] = []
        self._prompt([{"role": "user", "content": "?"}])
        if system is not None:
            self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self._n_system() else None

    def set_system(self, text: str | None) -> None:
        """Another system message, or none; turns stay. TmacError if the template refuses it."""
        rest = self.messages[self._n_system() :]
        messages = [] if text is None else [{"role": "system", "content": text}]
        self._prompt([*messages, {"role": "user", "content": "?"}])
        self.messages = messages + rest

    def reset(self) -> None:
        """Forget all but the system message."""
        del self.messages[self._n_system() :]

    def stream(
        self, text: str, **options: Unpack[GenerationOptions]
    ) -> Generator[Token, None, None]:
        """Answer ``text``; see :meth:`Conversation.stream`."""
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = self._fitting(messages, self._answer_room(options))
        options["trim_space"] = True
        tokens = self.session.stream(ids, **options)
        self.dropped = dropped
        return self._answer(messages, tokens)

    def _answer(
        self, messages: list[dict[str, str]], tokens: Generator[Token, None, None]
    ) -> Generator[Token, None, None]:
        parts: list[str] = []
        try:
            with closing(tokens):
                for token in tokens:
                    parts.append(token.text)
                    yield token
        finally:
            if parts:
                self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]

    def _fitting(
        self, messages: list[dict[str, str]], room: int
    ) -> tuple[list[dict[str, str]], list[int], int]:
        """The messages that are kept, their ids, and how many turns are not."""
        ids = self._prompt(messages)
        dropped, n_ctx, first = 0, self.session.n_ctx, self._n_system()
        limit = n_ctx - room
        while len(ids) > limit and (second := _next_user(messages, first + 1)) is not None:
            messages = messages[:first] + messages[second:]
            ids = self._prompt(messages)
            dropped += 1
            limit = n_ctx // 2
        return messages, ids, dropped

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._model.chat_prompt(messages, **self._variables)

    def _n_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _note(self) -> dict[str, Any]:
        return {"messages": self.messages}

    def _restore(self, note: dict[str, Any]) -> bool:
        messages = note.get("messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            return False
        self.messages = messages
        return True


class Text(Conversation):
    """One text without a template, that both sides continue.

    Attributes:
        text: all of it that counts.
    """

    unit = "token"

    def __init__(self, model: Model, session: Session | None = None) -> None:
        """An empty text."""
        super().__init__(model, session)
        self.text = ""

    def reset(self) -> None:
        """Begin a new text."""
        self.text = ""

    def stream(
        self, text: str, **options: Unpack[GenerationOptions]
    ) -> Generator[Token, None, None]:
        """Continue after ``text``, which stands on a new line; see :meth:`Conversation.stream`."""
        line = "" if not self.text or self.text.endswith("\n") else "\n"
        whole = f"{self.text}{line}{text}"
        tokenizer, n_ctx = self._model.tokenizer, self.session.n_ctx
        ids, dropped = tokenizer.encode(whole), 0
        if len(ids) > n_ctx - self._answer_room(options) and self.text:
            least = len(tokenizer.encode(text))
            kept = max(least, n_ctx // 2)
            whole = tokenizer.decode(ids[-kept:])
            dropped = max(0, len(ids) - kept)
            ids = tokenizer.encode(whole)
        tokens = self.session.stream(ids, **options)
        self.dropped = dropped
        return self._continue(whole, tokens)

    def _continue(
        self, text: str, tokens: Generator[Token, None, None]
    ) -> Generator[Token, None, None]:
        with closing(tokens):
            for token in tokens:
                text += token.text
                self.text = text
                yield token

    def _note(self) -> dict[str, Any]:
        return {"text": self.text}

    def _restore(self, note: dict[str, Any]) -> bool:
        text = note.get("text")
        if not isinstance(text, str):
            return False
        self.text = text
        return True


def open_conversation(
    model: Model,
    session: Session | None = None,
    *,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    raw: bool = False,
) -> Chat | Text:
    """A chat; a text with ``raw`` or where the model has no chat template.

    TmacError for a system message without a template.
    """
    if not raw and model.chat_template is not None:
        return Chat(model, session, system=system, variables=variables)
    if system is not None:
        raise TmacError("--system needs a chat template, and this model has none")
    return Text(model, session)


def _next_user(messages: Sequence[Mapping[str, str]], start: int) -> int | None:
    """Where the next turn of the user is, from ``start`` on."""
    places = range(start, len(messages))
    return next((i for i in places if messages[i]["role"] == "user"), None)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
