"""Checkpoint formats to .lut files: one reader per format, found by looking at the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from tmac_py.converters import gguf, huggingface
from tmac_py.converters.checkpoint import (
    HEADS,
    Checkpoint,
    Reader,
    TensorSource,
    listed,
    naming,
)
from tmac_py.converters.lora import merge_lora
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutwriter import LutWriter
from tmac_py.packing import pack
from tmac_py.quant import MAX_BITS, MatrixLike, QuantTensor, Search, quantize_rtn

__all__ = [
    "READERS",
    "Checkpoint",
    "Progress",
    "QuantOptions",
    "Reader",
    "convert",
    "convert_checkpoint",
    "open_checkpoint",
]

READERS: tuple[Reader, ...] = (cast(Reader, gguf), cast(Reader, huggingface))
"""Readers in the order they are asked."""

Progress = Callable[[int, int, str], None]
"""Called with weights done, weights in all, and the name of the tensor that comes next."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class QuantOptions:
    """How matrices that a checkpoint stores as floats are quantised; codes it stores are kept.

    ``head_bits`` is for the embedding and lm_head. ``asym`` None stores an offset per group below 8
    bits and none at 8. ``group_size`` -1 is the whole row.
    """

    bits: int = 4
    group_size: int = 32
    asym: bool | None = None
    search: Search = "mse"
    head_bits: int = 8

    def __post_init__(self) -> None:
        for name, value in (("bits", self.bits), ("head_bits", self.head_bits)):
            if not 1 <= value <= MAX_BITS:
                raise UnsupportedError(f"{name} {value} is not supported (1 to {MAX_BITS})")
        if self.group_size != -1 and (self.group_size < 4 or self.group_size % 4):
            raise UnsupportedError(
                f"group_size {self.group_size} is not supported "
                "(a multiple of 4, or -1 for the whole row)"
            )

    def quantize(self, name: str, matrix: MatrixLike) -> QuantTensor:
        """Quantise one matrix. Raises ValueError for weights that are not finite."""
        bits = self.head_bits if name in HEADS else self.bits
        asym = bits < 8 if self.asym is None else self.asym
        return quantize_rtn(
            matrix, bits=bits, group_size=self.group_size, asym=asym, search=self.search
        )


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find the reader for ``source`` and read everything but the weights.

    Raises ModelFileError for a missing or broken source, UnsupportedError for one of another kind.
    """
    path = Path(source)
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder")
    for reader in READERS:
        if reader.detect(path):
            return reader.read(path)
    if path.suffix in _PICKLES:
        raise UnsupportedError(
            f"{path}: a pickle, which can run code when it is opened; safetensors or GGUF is needed"
        )
    if path.is_dir():
        raise UnsupportedError(f"{path}: a folder without config.json")
    raise UnsupportedError(f"{path}: neither a GGUF file nor a Hugging Face folder")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    asym: bool | None = None,
    search: Search | None = None,
    head_bits: int | None = None,
    requantize: bool = False,
    lora: str | Path | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Convert a GGUF file or a Hugging Face folder to a .lut file, replacing ``out``.

    The options are for matrices stored as floats (None: the defaults of QuantOptions); a source
    without such matrices refuses them. ``requantize`` dequantises matrices in types whose codes a
    .lut cannot keep and quantises them like floats; without it they are refused. ``lora`` is the
    folder of a peft adapter to merge into matrices stored as floats. Memory is bounded by about one
    tensor; ``out`` appears whole or not at all; equal sources and options give equal bytes.
    ``warn`` gets what is worth knowing.

    Raises ModelFileError, UnsupportedError, and OSError for files that cannot be read or written.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("bits", bits),
            ("group_size", group_size),
            ("asym", asym),
            ("search", search),
            ("head_bits", head_bits),
        )
        if value is not None
    }
    options = QuantOptions(**given)
    checkpoint = open_checkpoint(source)
    with naming(Path(source)):
        checkpoint.config.check_runnable()
    if lora is not None:
        checkpoint = merge_lora(checkpoint, Path(lora))
    _check_codebooks(source, checkpoint, requantize)
    _refuse_idle(source, checkpoint, set(given))
    if warn is not None:
        for text in checkpoint.warnings:
            warn(text)
    with naming(Path(source)):
        convert_checkpoint(checkpoint, out, options, progress=progress)


def convert_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    options: QuantOptions,
    *,
    progress: Progress | None = None,
) -> None:
    """Quantise and pack every tensor of an open checkpoint; see `convert`."""
    source = dict(checkpoint.source)
    if any(tensor.dense for tensor in checkpoint.tensors):
        settings = dataclasses.asdict(options).items()
        source["quantised"] = "rtn " + " ".join(f"{name}={value}" for name, value in settings)
    done, total = 0, checkpoint.n_elements
    with LutWriter(
        out,
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        source=source,
        ordered=[tensor.name for tensor in checkpoint.tensors if tensor.ordered],
    ) as writer:
        for tensor in checkpoint.tensors:
            if progress is not None:
                progress(done, total, tensor.name)
            try:
                _write(writer, tensor, options)
            except ValueError as error:
                raise ModelFileError(f"tensor {tensor.name}: {error}") from error
            done += tensor.n_elements
        if progress is not None:
            progress(done, total, "")


def _write(writer: LutWriter, tensor: TensorSource, options: QuantOptions) -> None:
    """Write one tensor; nothing of it stays in memory."""
    loaded = tensor.load()
    if isinstance(loaded, np.ndarray) and loaded.ndim == 1:
        if not np.isfinite(loaded).all():
            raise ValueError("weights are not finite")
        writer.add_float(tensor.name, loaded)
        return
    if isinstance(loaded, QuantTensor):
        quantised = loaded
    else:
        quantised = options.quantize(tensor.name, loaded)
    writer.add_linear(tensor.name, pack(quantised), quantised.spec, quantised.order)


def _check_codebooks(source: str | Path, checkpoint: Checkpoint, requantize: bool) -> None:
    """Codes that are not evenly spaced are given up only where the user says so."""
    stored = [f"{t.name} {t.codebook}" for t in checkpoint.tensors if t.codebook]
    if stored and not requantize:
        raise UnsupportedError(
            f"{source}: a .lut cannot keep the codes of {listed(stored)}; --requantize "
            "(requantize=True) dequantises such matrices and quantises them anew, at some loss"
        )
    if requantize and not stored:
        raise UnsupportedError(
            f"{source}: requantize would have no effect: all stored codes can be kept"
        )


def _refuse_idle(source: str | Path, checkpoint: Checkpoint, given: set[str]) -> None:
    """An option that no matrix would heed is an error, not a silence."""
    dense = {tensor.name for tensor in checkpoint.tensors if tensor.dense}
    idle = {
        "bits": not dense - set(HEADS),
        "head_bits": not dense & set(HEADS),
        "group_size": not dense,
        "asym": not dense,
        "search": not dense,
    }
    if useless := sorted(name for name in given if idle[name]):
        raise UnsupportedError(
            f"{source}: {', '.join(useless)} would have no effect: the matrices concerned are "
            "already quantised, and their codes are kept"
        )
