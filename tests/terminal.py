"""A pseudo-terminal with a program in it, as a user types and reads."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time

TIMEOUT = 120


class Terminal:
    """``python -m tmac_py`` with these arguments and environment, in a terminal."""

    def __init__(self, *argv: str, **environment: str) -> None:
        self.output = ""
        self._seen = 0
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            env = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1", **environment}
            os.execve(sys.executable, [sys.executable, "-m", "tmac_py", *argv], env)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, a moment later: readline shows its prompt before it hears signals."""
        time.sleep(1)
        self.type("\x03")

    def wait(self, pattern: str) -> str:
        """Read until ``pattern`` is found in what came since the last call; gives what came."""
        deadline = time.monotonic() + TIMEOUT
        while not (match := re.compile(pattern, re.DOTALL).search(self.output, self._seen)):
            assert time.monotonic() < deadline, self.output
            assert self._read(), self.output
        found = self.output[self._seen : match.end()]
        self._seen = match.end()
        return found

    def send(self, line: str) -> str:
        """Type a line and wait for the next prompt; gives what came before that."""
        self.type(f"{line}\r")
        self.wait(r"\r\n")
        return self.wait(r">>> ").removesuffix(">>> ")

    def end(self) -> int:
        """Read to the end; the exit status."""
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        """Take some output; False at the end."""
        readable, _, _ = select.select([self._fd], [], [], TIMEOUT)
        assert readable, self.output
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux says so when the program has gone
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
