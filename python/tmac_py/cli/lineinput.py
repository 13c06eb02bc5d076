"""Messages from the keyboard: editing, history, several lines."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import platformdirs

PROMPT, MORE = ">>> ", "... "
_HISTORY_LINES = 1000
_BLOCK = '"""'


def history_file() -> Path:
    """Where what was typed is kept: $TMAC_HISTORY, else in the user's state folder."""
    if given := os.environ.get("TMAC_HISTORY"):
        return Path(given)
    return platformdirs.user_state_path("tmac_py", appauthor=False) / "chat_history"


def on_terminal() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


class LineInput:
    """Reads messages: lines that end in a backslash go on, lines between triple quotes are one.

    On a terminal lines are edited with readline and kept in a history file that only the user may
    read; elsewhere they are read as they come, without a prompt.
    """

    def __init__(self) -> None:
        self._terminal = on_terminal() and sys.stdout.isatty()
        self._readline = _import_readline() if self._terminal else None
        self._saved = 0
        if self._readline is not None:
            self._readline.set_history_length(_HISTORY_LINES)
            with suppress(OSError):
                self._readline.read_history_file(history_file())
            self._saved = self._readline.get_current_history_length()

    def read(self) -> str:
        """The next message, without the newline at its end.

        Raises:
            EOFError: there is none (Ctrl-D).
            KeyboardInterrupt: Ctrl-C with nothing typed; where something is, that is forgotten.
        """
        while True:
            lines: list[str] = []
            try:
                while not _is_complete(lines):
                    lines.append(self._line(MORE if lines else PROMPT))
            except EOFError:
                if not lines:
                    raise
            except KeyboardInterrupt:
                typed = self._readline is not None and self._readline.get_line_buffer()
                print(flush=True)
                if not lines and not typed:
                    raise
                continue
            self._keep()
            return _message(lines)

    def _line(self, prompt: str) -> str:
        if self._terminal:
            return input(prompt)
        line = "" if sys.stdin is None else sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _keep(self) -> None:
        """Append what was typed to the history file; a folder that cannot be written is no harm."""
        if self._readline is None:
            return
        length = self._readline.get_current_history_length()
        new, self._saved = length - self._saved, length
        if new <= 0:
            return
        with suppress(OSError):
            path = history_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._readline.append_history_file(new, path)


def _import_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _is_complete(lines: list[str]) -> bool:
    if not lines:
        return False
    if lines[0].lstrip().startswith(_BLOCK):
        first = lines[0].lstrip()[len(_BLOCK) :]
        rest = [first, *lines[1:]]
        return rest[-1].rstrip().endswith(_BLOCK)
    return not lines[-1].endswith("\\")


def _message(lines: list[str]) -> str:
    text = "\n".join(lines)
    if text.lstrip().startswith(_BLOCK):
        text = text.strip().removeprefix(_BLOCK).removesuffix(_BLOCK)
        return text.removeprefix("\n").removesuffix("\n")
    return text.replace("\\\n", "\n").removesuffix("\\")
