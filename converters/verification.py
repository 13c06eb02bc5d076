"""Whether a .lut file is what a conversion of its source gives: read once more and compared.

Matrices whose codes are kept are unpacked and compared with the codes, scales and offsets of the
source. Then all is converted anew, with the settings given, and compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.converters.checkpoint import Checkpoint, TensorSource, listed
from tmac_py.converters.conversion import Progress, convert_checkpoint
from tmac_py.converters.model_layers import naming_tensor
from tmac_py.converters.options import QuantOptions
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile
from tmac_py.packing import unpack_rows
from tmac_py.quant import QuantTensor, row_chunks
from tmac_py.spec import LinearSpec

_CHUNK_ELEMENTS = 1 << 22
"""Weights of a matrix that are unpacked at once."""


def verify_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    options: QuantOptions,
    *,
    progress: Progress | None = None,
) -> None:
    """Compare the .lut file ``out`` with an open checkpoint converted with ``options``.

    Raises ModelFileError for a damaged file, and for one that differs, naming the first tensors,
    settings and tokenizer files that do.
    """
    with LutFile.open(out) as file:
        differences = _config_differences(checkpoint.config, file.config)
        if not differences:  # else there are other tensors
            found: dict[str, str] = {}
            for tensor in checkpoint.tensors:
                if tensor.is_matrix and not tensor.dense:
                    with naming_tensor(tensor.name):
                        if difference := _kept_difference(tensor, file):
                            found[tensor.name] = difference

            def comparison(_path: str | Path, **model: Any) -> Comparison:
                return Comparison(file, found, **model)

            convert_checkpoint(checkpoint, out, options, progress=progress, open_writer=comparison)
            differences = [f"{name} ({what})" for name, what in found.items()]
    if differences:
        raise ModelFileError(f"{out} differs in {listed(differences)}")


class Comparison:
    """Takes what a LutWriter would write, and notes where ``file`` has something else.

    ``differences`` has a name and a place for every tensor, setting and tokenizer file that does.
    """

    def __init__(
        self,
        file: LutFile,
        differences: dict[str, str],
        *,
        config: ModelConfig,
        tokenizer: Mapping[str, bytes],
        source: Mapping[str, str],
        ordered: Collection[str] = (),
    ) -> None:
        del config, ordered  # compared already
        self._file = file
        self._differences = differences
        self._tokenizer = tokenizer
        self._source = source

    def add_linear(
        self,
        name: str,
        packed: NDArray[np.uint8],
        spec: LinearSpec,
        order: NDArray[np.int32] | None = None,
    ) -> None:
        """See LutWriter."""
        stored, stored_spec = self._file.linear(name)
        difference = _spec_difference(spec, stored_spec, order, self._file.order(name))
        if difference is None and not np.array_equal(packed, stored):
            difference = f"byte {np.flatnonzero(packed != stored)[0]} of its packed weights"
        self._note(name, difference)

    def add_float(self, name: str, values: NDArray[np.float32]) -> None:
        """See LutWriter."""
        stored = self._file.float(name)
        self._note(name, _first("element", values.view(np.uint32), stored.view(np.uint32)))

    def __enter__(self) -> Comparison:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        stored = self._file.tokenizer
        for name in sorted({*stored, *self._tokenizer}):
            if stored.get(name) != self._tokenizer.get(name):
                self._note(f"tokenizer/{name}", "other bytes" if name in stored else "missing")
        for name in sorted({*self._file.source, *self._source} - {"file"}):
            made, found = self._source.get(name), self._file.source.get(name)
            if made != found:
                self._note(f"source {name}", f"{found!r} instead of {made!r}")

    def _note(self, name: str, difference: str | None) -> None:
        if difference is not None:
            self._differences.setdefault(name, difference)


def _config_differences(made: ModelConfig, found: ModelConfig) -> list[str]:
    pairs = [(f.name, getattr(made, f.name), getattr(found, f.name)) for f in fields(ModelConfig)]
    return [f"config {name} ({b!r} instead of {a!r})" for name, a, b in pairs if a != b]


def _kept_difference(tensor: TensorSource, file: LutFile) -> str | None:
    """The first place where a matrix differs whose codes are kept."""
    made = tensor.load()
    assert isinstance(made, QuantTensor)
    packed, spec = file.linear(tensor.name)
    difference = _spec_difference(made.spec, spec, made.order, file.order(tensor.name))
    if difference is None:
        for rows in row_chunks(spec.m, spec.k, _CHUNK_ELEMENTS):
            stored = unpack_rows(packed, spec, rows)
            for what, ours, theirs in (
                ("code", made.codes, stored.codes),
                ("scale", made.scales, stored.scales),
                ("offset", made.offsets, stored.offsets),
            ):
                if difference is None and ours is not None and theirs is not None:
                    difference = _first(what, _bits(ours[rows]), _bits(theirs), rows.start)
    return difference


def _spec_difference(
    made: LinearSpec,
    found: LinearSpec,
    made_order: NDArray[np.int32] | None,
    found_order: NDArray[np.int32] | None,
) -> str | None:
    for field in fields(LinearSpec):
        ours, theirs = getattr(made, field.name), getattr(found, field.name)
        if ours != theirs:
            return f"{field.name} {theirs} instead of {ours}"
    if (made_order is None) != (found_order is None):
        return "an order" if made_order is None else "no order"
    if made_order is None or found_order is None:
        return None
    return _first("order", made_order, found_order)


def _bits(values: NDArray[np.uint8] | NDArray[np.float16]) -> NDArray[np.generic]:
    """Of equal bits are equal, NaN and signs of zero too."""
    return values.view(np.uint16) if values.dtype == np.float16 else values


def _first(
    what: str, made: NDArray[np.generic], found: NDArray[np.generic], row: int = 0
) -> str | None:
    """The first place where two arrays of a shape differ, the first of their rows being ``row``."""
    places = np.argwhere(made != found)
    if not len(places):
        return None
    place = [int(i) for i in places[0]]
    place[0] += row
    return f"{what} {place}"
