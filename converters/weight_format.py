"""How checkpoints in Hugging Face folders store the matrix of one linear module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from tmac_py.converters.checkpoint import FloatMatrix, Shape
from tmac_py.converters.safetensors_file import StoredTensor
from tmac_py.quant import MatrixLike, QuantTensor

FLOATS = ("F32", "F16", "BF16")
"""safetensors dtypes that weights, scales and norms are read from."""

Parts = Mapping[str, StoredTensor]
"""The tensors of a module by what follows its name: "weight", or "qweight", "scales", ..."""


class Expected(NamedTuple):
    """Shape and possible dtypes of a tensor."""

    shape: Shape
    dtypes: tuple[str, ...]


class WeightFormat(Protocol):
    """One way to store a matrix ``[m, k]``: codes and what belongs to them, or floats."""

    @property
    def dense(self) -> bool:
        """Whether ``load`` gives floats, which are quantised afterwards."""

    def expected(self, shape: Shape, parts: Parts, /) -> Mapping[str, Expected]:
        """The tensors by which a module of this ``shape`` is stored; all of them must be there.

        ``parts`` are those the checkpoint has, for what may be missing or of one of several shapes.
        """

    def load(self, shape: Shape, parts: Parts, /) -> QuantTensor | MatrixLike:
        """The matrix. ``parts`` are as expected. Raises ValueError for contents that are not."""


class Dense:
    """Floats in a tensor "weight"."""

    dense = True

    def expected(self, shape: Shape, _parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        return {"weight": Expected(shape, FLOATS)}

    def load(self, _shape: Shape, parts: Parts) -> MatrixLike:
        """See WeightFormat."""
        return FloatMatrix(parts["weight"].load())


DENSE = Dense()

FormatOf = Callable[[str, Parts], WeightFormat]
"""Which format a linear module is stored in, by its name and what the checkpoint has of it.

Raises UnsupportedError, naming the module, for one that cannot be read."""


def is_dense(parts: Parts) -> bool:
    """Whether a module has floats where formats of codes have other tensors."""
    return "weight" in parts and parts["weight"].dtype in FLOATS
