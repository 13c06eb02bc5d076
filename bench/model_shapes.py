"""Shapes of the matrices of a model: text files with a matrix a line, or MxK on the command line.

A line is ``name m k count``: the matrix is m x k (y = W x) and the model has ``count`` of them.
"#" begins a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("shapes")


class ShapeError(ValueError):
    """A file of shapes, or its name, is wrong."""


@dataclass(frozen=True)
class Matrix:
    """One kind of matrix."""

    name: str
    m: int
    k: int
    count: int = 1

    @property
    def size(self) -> str:
        return f"{self.m}x{self.k}"

    @property
    def label(self) -> str:
        return self.size if self.name == self.size else f"{self.name} {self.size}"


def parse_file(path: Path) -> list[Matrix]:
    """The matrices of a file, in its order; raises :exc:`ShapeError` with the line's number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: {error}") from None
    matrices: list[Matrix] = []
    for number, line in enumerate(lines, start=1):
        if not (fields := line.partition("#")[0].split()):
            continue
        where = f"{path.name}, line {number}"
        if len(fields) != 4:
            raise ShapeError(f"{where}: expected 'name m k count', found {' '.join(fields)!r}")
        name = fields[0]
        if any(matrix.name == name for matrix in matrices):
            raise ShapeError(f"{where}: the name {name!r} is there twice")
        m, k, count = (_positive(field, where) for field in fields[1:])
        matrices.append(Matrix(name, m, k, count))
    if not matrices:
        raise ShapeError(f"{path.name}: no matrix in the file")
    return matrices


def parse(text: str) -> list[Matrix]:
    """Of "4096x4096,1536x576", the name of a model in ``shapes/`` or a file; parts may mix."""
    matrices: list[Matrix] = []
    for part in text.split(","):
        if found := re.fullmatch(r"([0-9]+)x([0-9]+)", part):
            m, k = (_positive(field, repr(part)) for field in found.groups())
            matrices.append(Matrix(part, m, k))
        else:
            matrices += parse_file(_file(part))
    return _together(matrices)


def model_names() -> list[str]:
    """Of the files in ``shapes/``."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def _file(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".txt":
        return path
    if name not in model_names():
        known = ", ".join(model_names())
        raise ShapeError(f"{name!r} is neither MxK nor a file *.txt nor one of {known}")
    return FOLDER / f"{name}.txt"


def _together(matrices: list[Matrix]) -> list[Matrix]:
    """Matrices of the same size as one, with their names and counts put together."""
    by_size: dict[tuple[int, int], Matrix] = {}
    for new in matrices:
        old = by_size.get((new.m, new.k))
        name = new.name if old is None else f"{old.name}+{new.name}"
        count = new.count if old is None else old.count + new.count
        by_size[new.m, new.k] = Matrix(name, new.m, new.k, count)
    return list(by_size.values())


def _positive(text: str, where: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ShapeError(f"{where}: {text!r} is not a whole number of at least 1")
    return int(text)
