"""A process of its own for an engine or a library that is measured: lines of JSON both ways.

The script answers once when it is ready, and then each command with one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class WorkerDied(RuntimeError):  # noqa: N818
    """The process ended instead of giving an answer."""


class WorkerProcess:
    """``python script OPTIONS`` with OPTIONS as JSON."""

    def __init__(self, script: str, *, python: str = sys.executable, **options: Any) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self.facts = self._answer()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command; raises :exc:`WorkerDied` if there is none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate()
        except BrokenPipeError:
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> WorkerDied:
        return WorkerDied(f"its process ended with status {self._process.wait()}")
