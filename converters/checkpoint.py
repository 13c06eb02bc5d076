"""A checkpoint, whose tensors are loaded one at a time, and what its readers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig, is_matrix
from tmac_py.errors import ModelFileError, TmacError
from tmac_py.quant import MatrixLike, QuantTensor

Shape = tuple[int, ...]

HEADS = ("model.embed_tokens.weight", "lm_head.weight")
"""The two matrices over the vocabulary; they get their own number of bits."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""How files are named that are refused: opening them can run code."""

NO_TOKENIZER = "{} has no tokenizer that is supported: the model will run by token ids only"
"""Warning of a reader; takes the path."""

_MAX_NAMES = 8
"""Names listed per complaint; the rest are counted."""

_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
"""Special tokens that end an answer, whatever else a checkpoint states."""


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint under its Hugging Face name.

    ``load`` returns a QuantTensor where the checkpoint stores codes, a lazy float matrix ``[m, k]``
    where it stores floats (``dense``), and a float32 array for a norm ``[n]`` or a router. A
    QuantTensor may have an order if ``ordered``. ``codebook`` names the type of a dense matrix that
    is stored as codes, which a .lut cannot keep.
    """

    name: str
    shape: Shape
    load: Callable[[], QuantTensor | MatrixLike | NDArray[np.float32]]
    dense: bool = False
    codebook: str = ""
    ordered: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it gets codes; else it is a norm, a bias or a router."""
        return is_matrix(self.name, self.shape)

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Checkpoint:
    """A model as a reader understood it.

    ``tokenizer`` maps the file names a .lut carries to their contents (empty: no tokenizer),
    ``source`` says where the weights came from, ``warnings`` are for the user.
    """

    config: ModelConfig
    tokenizer: dict[str, bytes]
    source: dict[str, str]
    tensors: Sequence[TensorSource]
    warnings: tuple[str, ...] = ()

    @property
    def n_elements(self) -> int:
        """Number of weights, norms included."""
        return sum(tensor.n_elements for tensor in self.tensors)


class Reader(Protocol):
    """One checkpoint format: a module with these two functions, listed in tmac_py.converters."""

    def detect(self, path: Path) -> bool:
        """Whether ``path`` is of this format; looks at names and first bytes only."""

    def read(self, path: Path) -> Checkpoint:
        """Check everything but the weights' values; raises ModelFileError or UnsupportedError."""


@dataclass(frozen=True)
class FloatMatrix:
    """Rows of a stored float matrix ``[m, k]``, converted to float32 as they are sliced.

    ``stored`` is float16, float32, or uint16 holding bfloat16; ``rows`` reorders the rows.
    """

    stored: NDArray[np.generic]
    rows: NDArray[np.intp] | None = None

    @property
    def shape(self) -> Shape:
        """``(m, k)``."""
        return self.stored.shape

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        return as_float32(self.stored[rows if self.rows is None else self.rows[rows]])


def as_float32(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Convert float16, float32 or (as uint16) bfloat16 values to float32."""
    if stored.dtype == np.uint16:
        shifted: NDArray[np.uint32] = stored.astype(np.uint32)
        shifted <<= np.uint32(16)
        return shifted.view(np.float32)
    return stored.astype(np.float32)


def check_tensors(
    path: Path,
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    *,
    name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Raise one ModelFileError that names all missing, extra and mis-shaped tensors.

    ``name_of`` turns a Hugging Face name into the one the file uses.
    """
    missing = [f"{name_of(n)} {list(expected[n])}" for n in expected if n not in found]
    extra = [f"{name_of(n)} {list(found[n])}" for n in found if n not in expected]
    misshaped = [
        f"{name_of(n)} {list(found[n])} instead of {list(expected[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    complaints = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("not expected", extra),
            ("of another shape", misshaped),
        )
        if names
    ]
    if complaints:
        raise ModelFileError(f"{path}: tensors {'; '.join(complaints)}")


def listed(names: Sequence[str]) -> str:
    """``"a, b, c"``; of many names the first few and the number of the others."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def end_token_ids(stated: Iterable[int | None], special: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: those a checkpoint states, then those known to.

    ``stated`` may hold None and the same id twice; ``special`` maps the vocabulary's special tokens
    to their ids.
    """
    ids = [*stated, *(special.get(text) for text in _END_TEXTS)]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Make every TmacError raised inside begin with ``path`` or a file in that folder."""
    try:
        yield
    except TmacError as error:
        text = str(error)
        if text.startswith((f"{path}:", f"{path}{os.sep}")):
            raise
        raise type(error)(f"{path}: {text}") from error
