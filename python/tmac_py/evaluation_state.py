"""What an evaluation has done so far, in a file, so that it can go on after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar

from tmac_py.errors import OptionError
from tmac_py.evaluation import ChunkScores
from tmac_py.multiple_choice import Answers

_FORMAT = "tmac-eval state 1"

Record = TypeVar("Record", ChunkScores, Answers)


class StateFile(Generic[Record]):
    """The records of an evaluation; a context manager.

    The file has one line of JSON that says what is evaluated, then one for each record, added when
    it is complete. A last line that is not (of a killed program) does not count.

    Args:
        path: the file, which may exist; None keeps the records in memory only.
        task: what is evaluated, as JSON values: a file of something else is refused.
        parse: JSON value to record; raises ValueError, TypeError or KeyError.
        total: records that there will be.

    Attributes:
        records: those of the file, then those added.

    Raises:
        OptionError: the file belongs to another evaluation, or is none of these.
    """

    def __init__(
        self,
        path: Path | None,
        task: Mapping[str, Any],
        parse: Callable[[Any], Record],
        total: int,
    ) -> None:
        self.records: list[Record] = []
        self._file: BinaryIO | None = None
        if path is None:
            return
        head = _line({"format": _FORMAT, **task})
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            _check_task(path, whole[: whole.index(b"\n")], head)
            lines = whole.splitlines()[1:]
            for number, line in enumerate(lines, 2):
                try:
                    if number > total + 1:
                        raise ValueError("more than all")
                    self.records.append(parse(json.loads(line)))
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise OptionError(
                        f"{path}: line {number} is damaged; remove the file to start anew"
                    ) from error
        elif not head.startswith(content):
            raise OptionError(f"{path}: not a state file of tmac-eval")
        self._file = path.open("r+b" if content else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write(head)

    def append(self, record: Record) -> None:
        """Add what was done."""
        self._write(_line(asdict(record)))
        self.records.append(record)

    def _write(self, line: bytes) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()

    def __enter__(self) -> StateFile[Record]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _check_task(path: Path, found: bytes, head: bytes) -> None:
    """OptionError unless the first line of the file is ``head``; names what differs."""
    try:
        old = json.loads(found)
        mine = isinstance(old, dict) and old.get("format") == _FORMAT
    except (ValueError, RecursionError):
        mine = False
    if not mine:
        raise OptionError(f"{path}: not a state file of tmac-eval")
    new = json.loads(head)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        raise OptionError(
            f"{path}: the state of another evaluation, which differs in {', '.join(differing)}; "
            "give another file to --resume"
        )
