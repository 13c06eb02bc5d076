"""A chat in the terminal: messages in, answers out, commands that begin with a slash."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tmac_py.cli.answer import Answer
from tmac_py.cli.lineinput import LineInput, on_terminal
from tmac_py.conversation import Chat, Text
from tmac_py.errors import TmacError
from tmac_py.generate import Token

EXIT_INTERRUPTED = 130

_COMMANDS = {
    "/reset": "forget what was said",
    "/system TEXT": 'show the system message, or set it to TEXT ("" = none)',
    "/save FILE": "write the chat, and what was computed of it, to FILE",
    "/load FILE": "go on with a chat that was saved",
    "/stats": "tokens and speed of the last answer, room in the context",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does",
}
_HELP = """
A line that ends in \\ goes on in the next one; so do lines between \"\"\" and \"\"\".
A message that begins with a slash needs a space before it.
Ctrl-C stops an answer, a second one at the prompt leaves."""


class ChatProgram:
    """Runs one conversation until the user leaves.

    Args:
        conversation: what is gone on with.
        options: of every answer, see :class:`tmac_py.options.GenerationOptions`; ``seed`` counts
            up from answer to answer.
        quiet: no hints on stderr.
    """

    def __init__(
        self, conversation: Chat | Text, options: dict[str, Any], *, quiet: bool = False
    ) -> None:
        self._conversation = conversation
        self._options = options
        self._quiet = quiet
        self._input = LineInput()
        self._last: Answer | None = None
        self._answers = 0
        self.n_first_prompt = 0
        """Tokens of the first prompt."""

    def run(self, first: str | None = None, *, single: bool = False) -> int:
        """Answer ``first``, if given, then what the user types (``single``: one message in all).

        Returns the exit status: 0, or 130 if Ctrl-C left.
        """
        interrupted = False
        text = first
        while True:
            if text is None:
                try:
                    text = self._input.read()
                except EOFError:
                    if on_terminal():
                        print(flush=True)
                    return 0
                except KeyboardInterrupt:
                    if interrupted:
                        return EXIT_INTERRUPTED
                    interrupted = True
                    self._hint("Ctrl-C again, Ctrl-D or /exit leaves")
                    continue
                except ValueError as error:  # bytes that are no text in the terminal's encoding
                    self._say(f"not understood: {error}")
                    continue
            interrupted = False
            if text.startswith("/") and "\n" not in text and text is not first:
                if not self._command(text):
                    return 0
            elif text.strip():
                interrupted = self._answer(text)
                if single:
                    return EXIT_INTERRUPTED if interrupted else 0
            text = None

    def _answer(self, text: str) -> bool:
        """Show what the model says to ``text``; whether Ctrl-C stopped it."""
        answer = Answer(n_prompt=0)
        options = {**self._options, "seed": self._options["seed"] + self._answers}
        with _ctrl_c_noted() as stopped:

            def progress(done: int, total: int) -> None:
                answer.n_prompt = total
                answer.prefilled(done, total)
                if stopped.is_set():
                    raise KeyboardInterrupt

            try:
                stream = self._conversation.stream(text, progress=progress, **options)
                if dropped := self._conversation.dropped:
                    unit = self._conversation.unit
                    self._hint(
                        f"[context full: the oldest {dropped} {unit}{'s' * (dropped > 1)} "
                        "left out; /reset begins anew]"
                    )
                with closing(_stoppable(stream, stopped)) as tokens:
                    answer.collect(tokens, _show)
            except TmacError as error:
                self._say(f"error: {' '.join(str(error).split())}")
                return False
        self._last, self._answers = answer, self._answers + 1
        self.n_first_prompt = self.n_first_prompt or answer.timings.n_prompt
        if not answer.text.endswith("\n"):
            print(flush=True)
        last = answer.tokens[-1] if answer.tokens else None
        if answer.interrupted:
            self._hint("[stopped]")
        elif last is not None and last.finish_reason == "length":
            n_ctx = self._conversation.session.n_ctx
            full = last.n_prompt + last.n_gen >= n_ctx
            why = f"the context of {n_ctx} tokens is full (-c)" if full else "as long as -n allows"
            self._hint(f"[cut off: {why}]")
        return answer.interrupted

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/clear": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/help": self._help,
            "/?": self._help,
        }
        action = actions.get(name)
        if action is None:
            known = " ".join(command.partition(" ")[0] for command in _COMMANDS)
            self._say(f"{name}: no such command; there are: {known}")
            return True
        try:
            action(rest)
        except (TmacError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.strerror:
                reason = f"{error.filename}: {error.strerror}"
            self._say(f"error: {' '.join(reason.split())}")
        return True

    def _reset(self, _rest: str) -> None:
        self._conversation.reset()
        self._answers = 0
        self._hint("[a new chat]" if isinstance(self._conversation, Chat) else "[a new text]")

    def _system(self, rest: str) -> None:
        if not isinstance(self._conversation, Chat):
            raise TmacError("a system message needs a chat template")
        if rest:
            self._conversation.set_system(None if rest == '""' else rest)
            self._hint("[system message set]" if rest != '""' else "[no system message]")
        else:
            self._say(self._conversation.system or "no system message")

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save FILE")
        self._conversation.save(path)
        self._hint(f"[saved to {path}]")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load FILE")
        self._conversation.load(path)
        self._hint(f"[{len(self._conversation.session.ids)} tokens loaded from {path}]")

    def _stats(self, _rest: str) -> None:
        session = self._conversation.session
        if self._last is not None:
            self._say(self._last.statistics())
        self._say(f"context {len(session.ids)} of {session.n_ctx} tokens")

    def _help(self, _rest: str) -> None:
        width = max(map(len, _COMMANDS))
        self._say("\n".join(f"{name.ljust(width)}  {text}" for name, text in _COMMANDS.items()))
        self._say(_HELP.strip())

    def _hint(self, text: str) -> None:
        if not self._quiet:
            self._say(text)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def greet(conversation: Chat | Text, name: str, threads: int) -> None:
    """Say on stderr what runs and how to go on."""
    lines = [
        f"{name} · {threads} thread{'s' * (threads > 1)} · "
        f"context of {conversation.session.n_ctx} tokens",
        "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves",
    ]
    if isinstance(conversation, Text):
        lines.insert(1, "without a chat template: what you type is continued, as one text")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _path(rest: str, usage: str) -> Path:
    if not rest:
        raise TmacError(f"the name of a file is needed: {usage}")
    try:
        return Path(rest).expanduser()
    except RuntimeError:  # "~nobody"
        return Path(rest)


def _show(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _ctrl_c_noted() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of an exception anywhere."""
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if main:
        signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _stoppable(
    tokens: Generator[Token, None, None], stopped: threading.Event
) -> Generator[Token, None, None]:
    """``tokens``, ended by KeyboardInterrupt after the one during which ``stopped`` was set."""
    with closing(tokens):
        for token in tokens:
            yield token
            if stopped.is_set() and token.finish_reason is None:
                raise KeyboardInterrupt
