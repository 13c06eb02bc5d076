"""Checkpoint formats to .lut files: one reader per format, found by looking at the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tmac_py.converters import gguf, huggingface
from tmac_py.converters.checkpoint import HEADS, PICKLES, Checkpoint, Reader, listed, naming
from tmac_py.converters.conversion import Progress, convert_checkpoint, needs_calibration
from tmac_py.converters.hub import SCHEME, fetch, parse_id
from tmac_py.converters.lora import merge_lora
from tmac_py.converters.options import QuantOptions
from tmac_py.converters.stored_heads import requantize_heads
from tmac_py.converters.verification import verify_checkpoint
from tmac_py.errors import ModelFileError, UnsupportedError

__all__ = [
    "READERS",
    "Checkpoint",
    "Progress",
    "QuantOptions",
    "Reader",
    "check_codebooks",
    "convert",
    "convert_checkpoint",
    "open_checkpoint",
]

READERS: tuple[Reader, ...] = (cast(Reader, gguf), cast(Reader, huggingface))
"""Readers in the order they are asked."""


def open_checkpoint(source: str | Path, *, quiet: bool = True) -> Checkpoint:
    """Find the reader for ``source`` and read everything but the weights.

    ``source`` is a path, or else the name of a repository on the Hugging Face hub
    (`tmac_py.converters.hub.parse_id`), whose files are fetched into the hub's cache; ``quiet``
    without bars.

    Raises ModelFileError for a missing or broken source, UnsupportedError for one of another kind.
    """
    path = Path(source)
    if not path.exists() and (hub_id := parse_id(str(source))) is not None:
        path, name = fetch(hub_id, quiet=quiet)
        checkpoint = open_checkpoint(path)
        return replace(checkpoint, source={**checkpoint.source, "file": name})
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder")
    for reader in READERS:
        if reader.detect(path):
            return reader.read(path)
    if path.suffix in PICKLES:
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
    quant: str | None = None,
    bits: int | None = None,
    bits_for: Sequence[tuple[str, int]] | None = None,
    head_bits: int | None = None,
    group_size: int | None = None,
    asym: bool | None = None,
    act_order: bool | None = None,
    target_bpw: float | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    requantize: bool = False,
    lora: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Convert a GGUF file, a Hugging Face folder or one on the hub to a .lut file at ``out``.

    The options are for matrices stored as floats (None: the defaults of QuantOptions); a source
    without such matrices refuses them. ``head_bits``, if it is given, is for embedding and lm_head
    that are stored as codes of more bits too. ``requantize`` dequantises matrices in types whose
    codes a .lut cannot keep and quantises them like floats; without it they are refused. ``lora``
    is the folder of a peft adapter to merge into matrices stored as floats. Memory is bounded by
    about one tensor, or by one layer and the activations of the calibration text; ``out`` appears
    whole or not at all; equal sources and options give equal bytes (calibrated ones on equal
    machines: BLAS sums as the CPU likes it).
    ``verify`` writes nothing: it converts once more and compares the ``out`` that is there.
    ``warn`` gets what is worth knowing.

    Raises ModelFileError (for a difference that ``verify`` finds too), UnsupportedError, and
    OSError for files that cannot be read or written.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("quant", quant),
            ("bits", bits),
            ("bits_for", None if bits_for is None else tuple(bits_for)),
            ("head_bits", head_bits),
            ("group_size", group_size),
            ("asym", asym),
            ("act_order", act_order),
            ("target_bpw", target_bpw),
            ("calibration", calibration),
            ("calibration_tokens", calibration_tokens),
        )
        if value is not None
    }
    options = QuantOptions(**given)
    checkpoint = open_checkpoint(source, quiet=progress is None)
    where = source if str(source).startswith(SCHEME) else Path(source)
    if lora is not None:
        checkpoint = merge_lora(checkpoint, Path(lora))
    check_codebooks(source, checkpoint, requantize=requantize)
    if head_bits is not None:
        with naming(where):
            checkpoint = requantize_heads(checkpoint, head_bits)
    _refuse_idle(source, checkpoint, options, list(given))
    if warn is not None:
        for text in checkpoint.warnings:
            warn(text)
    with naming(where):
        work = verify_checkpoint if verify else convert_checkpoint
        work(checkpoint, out, options, progress=progress)


def check_codebooks(source: str | Path, checkpoint: Checkpoint, *, requantize: bool) -> None:
    """Codes that are not evenly spaced are given up only where the user says so.

    Raises UnsupportedError.
    """
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


def _refuse_idle(
    source: str | Path, checkpoint: Checkpoint, options: QuantOptions, given: list[str]
) -> None:
    """An option that no matrix would heed is an error, not a silence."""
    dense = {tensor.name for tensor in checkpoint.tensors if tensor.dense}
    layers = bool(dense - set(HEADS))
    idle = {"bits": not layers, "act_order": not layers, "head_bits": not dense & set(HEADS)}
    if useless := [name for name in given if idle.get(name, not dense)]:
        raise UnsupportedError(
            f"{source}: {', '.join(useless)} would have no effect: the matrices concerned are "
            "already quantised, and their codes are kept"
        )
    if "quant" in given and options.method.alone is not None and not layers:
        raise UnsupportedError(
            f"{source}: quant {options.quant} would have no effect: only embedding and lm_head are "
            "stored as floats, and it looks at inputs in layers (rtn, mse, hqq and bcq need none)"
        )
    looks = needs_calibration(checkpoint, options)
    if useless := [name for name in given if name.startswith("calibration") and not looks]:
        raise UnsupportedError(
            f"{source}: {', '.join(useless)} would have no effect: quant {options.quant} looks at "
            "no activations (bcq, gptq and awq do, and target_bpw with a calibration text)"
        )
