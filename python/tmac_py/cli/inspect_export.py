"""``tmac inspect --export``: what a .lut file holds as files that other programs read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from tmac_py.cli.diff import float_rows
from tmac_py.errors import OptionError
from tmac_py.lutfile import LutFile
from tmac_py.lutheader import TensorEntry


def export(
    file: LutFile, facts: dict[str, Any], folder: Path, patterns: Sequence[str]
) -> list[str]:
    """Write a new folder; nothing is left of it where that fails.

    Args:
        file: the file.
        facts: go to ``tmac.json``.
        folder: must not exist yet, unless it is empty. Gets the tokenizer's files as they are, and
            a float32 array ``NAME.npy`` for each matrix ``[m, k]`` and vector that is asked for,
            dequantised, columns in the order of the activations.
        patterns: names of tensors, ``*`` and ``?`` as in a shell.

    Returns:
        The names of the files.

    Raises:
        OptionError: the folder has files or its parent is none; a pattern fits no matrix or vector.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder}: exists; --export needs a new folder, or an empty one")
    if not folder.absolute().parent.is_dir():
        raise OptionError(f"{folder}: the folder {folder.absolute().parent} does not exist")
    chosen = _chosen(file, patterns)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "export"
        made.mkdir()
        (made / "tmac.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for name, content in file.tokenizer.items():
            (made / name).write_bytes(content)
        for entry in chosen:
            _write_array(file, entry, made / f"{entry.name}.npy")
        made.replace(folder)
    return ["tmac.json", *file.tokenizer, *(f"{entry.name}.npy" for entry in chosen)]


def _chosen(file: LutFile, patterns: Sequence[str]) -> list[TensorEntry]:
    """The tensors that patterns fit, in the order of the file."""
    entries = [entry for entry in file.tensors.values() if entry.kind in ("linear", "float")]
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in entries):
            raise OptionError(
                f"{file.path}: no matrix or vector is named {pattern!r}; --tensors lists them"
            )
    return [
        entry for entry in entries if any(fnmatchcase(entry.name, pattern) for pattern in patterns)
    ]


def _write_array(file: LutFile, entry: TensorEntry, path: Path) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=entry.shape)
    start = 0
    for rows in float_rows(file, entry):
        array[start : start + len(rows)] = rows
        start += len(rows)
    array.flush()
