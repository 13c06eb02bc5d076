"""``tmac convert``: a checkpoint, on the disk or on the Hugging Face hub, becomes a .lut file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from tmac_py.cli.tables import format_bytes
from tmac_py.errors import TmacError

METHODS = {
    "rtn": "rounding over the range of each group",
    "mse": "rounding over the range with the least squared error",
    "hqq": "half-quadratic: offsets that care less about outliers",
    "bcq": "calibrated: as gptq, but binary-coded up to 4 bits, with a scale for every bit",
    "gptq": "calibrated: later columns make up for the errors of earlier ones (slow, good)",
    "awq": "calibrated: columns that meet large activations are scaled up (slow, good)",
}
"""What ``--quant`` takes, and a word about each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``tmac convert``."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="GGUF file, Hugging Face folder, or ORG/NAME on the Hugging Face hub: "
        "ORG/NAME@REVISION for another revision, ORG/NAME:Q4_K_M or :FILE for one of several GGUF "
        "files (HF_HUB_OFFLINE=1: only what was fetched before)",
    )
    parser.add_argument("out", metavar="OUT.lut", nargs="?", help="file to write")
    parser.add_argument(
        "-o", "--outfile", metavar="OUT.lut", help="file to write, for those who prefer an option"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.lut if it exists")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="afterwards read SOURCE and OUT.lut once more and compare all matrices, vectors, "
        "settings and tokenizer files; where OUT.lut exists and --force is not given, only this",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    dense = parser.add_argument_group(
        "quantisation", "of matrices that SOURCE stores as floats; codes it stores are always kept"
    )
    dense.add_argument(
        "--quant",
        choices=tuple(METHODS),
        help="method (default: mse): "
        + "; ".join(f"{name}, {text}" for name, text in METHODS.items()),
    )
    dense.add_argument("--bits", type=int, metavar="N", help="bits per weight, 1 to 8 (default: 4)")
    dense.add_argument(
        "--bits-for",
        type=_pattern_bits,
        action="append",
        metavar="REGEX=N",
        help="bits of the matrices whose names hold REGEX; repeatable, the first that fits counts "
        "('down_proj|v_proj=6')",
    )
    dense.add_argument(
        "--head-bits",
        type=int,
        metavar="N",
        help="bits of embedding and lm_head (default: 6; stored codes are kept); those stored as "
        "codes of more bits are quantised anew",
    )
    dense.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help="choose the bits of each matrix by measured error, so that all matrices of the file, "
        "embedding, lm_head, scales and offsets included, have at most X bits per weight and at "
        "least 99%% of that",
    )
    dense.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale: a multiple of 4, or -1 for a whole row (default: 32)",
    )
    dense.add_argument(
        "--asym",
        action=argparse.BooleanOptionalAction,
        help="store an offset per group (default: below 8 bits; hqq and bcq: always)",
    )
    dense.add_argument(
        "--act-order",
        action="store_true",
        default=None,
        help="gptq and bcq: group columns by the size of their activations and store their order "
        "(docs/quantizers.md has what it gains)",
    )
    dense.add_argument(
        "--calibration",
        metavar="FILE",
        help="text in UTF-8 for bcq, gptq, awq and --target-bpw, like what the model will read "
        "(default: a text that comes along; --target-bpw of other methods: none)",
    )
    dense.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="tokens of it that are used (default: 8192, as far as there are so many)",
    )
    parser.add_argument(
        "--lora", metavar="FOLDER", help="merge this LoRA adapter (peft) into SOURCE first"
    )
    dense.add_argument(
        "--requantize",
        action="store_true",
        help="quantise matrices stored in types with codebooks (IQ1 to IQ4, MXFP4, NVFP4) as well, "
        "at some loss; without it they are refused",
    )


def execute(args: argparse.Namespace) -> int:
    """Convert; messages go to stderr. Returns the exit status, raises TmacError or OSError."""
    out = _out_path(args)
    only_verify = args.verify and out.exists() and not args.force
    if not only_verify:
        seconds = _convert(args, out, verify=False)
        if not args.quiet:
            print(f"{_summary(out)}, {seconds:.1f} s", file=sys.stderr)
    if args.verify:
        seconds = _convert(args, out, verify=True)
        if not args.quiet:
            print(f"{out}: equal to {args.source}, {seconds:.1f} s", file=sys.stderr)
    return 0


def _convert(args: argparse.Namespace, out: Path, *, verify: bool) -> float:
    """Convert, or compare; the seconds it took."""
    from tmac_py.converters import convert

    start = time.perf_counter()
    with _Progress("Verifying" if verify else "Converting", quiet=args.quiet) as progress:
        convert(
            args.source,
            out,
            quant=args.quant,
            bits=args.bits,
            bits_for=args.bits_for,
            head_bits=args.head_bits,
            group_size=args.group_size,
            asym=args.asym,
            act_order=args.act_order,
            requantize=args.requantize,
            lora=args.lora,
            target_bpw=args.target_bpw,
            calibration=args.calibration,
            calibration_tokens=args.calibration_tokens,
            verify=verify,
            progress=None if args.quiet else progress,
            warn=None if verify else progress.warn,
        )
    return time.perf_counter() - start


def _pattern_bits(text: str) -> tuple[str, int]:
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern or not bits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be REGEX=BITS, as in 'down_proj=6'")
    return pattern, int(bits)


def _out_path(args: argparse.Namespace) -> Path:
    names = [name for name in (args.out, args.outfile) if name is not None]
    if len(names) != 1:
        raise TmacError("one output file is needed: OUT.lut or -o OUT.lut")
    out = Path(names[0])
    if out.is_dir():
        raise TmacError(f"{out}: is a folder; the name of a .lut file is needed")
    if out.exists() and Path(args.source).exists() and out.samefile(args.source):
        raise TmacError(f"{out}: is the source itself")
    if out.exists() and not out.is_file():
        raise TmacError(f"{out}: is not a regular file; the name of a .lut file is needed")
    if out.exists() and not (args.force or args.verify):
        raise TmacError(f"{out}: exists already; --force replaces it, --verify compares it")
    if not out.absolute().parent.is_dir():
        raise TmacError(f"{out}: the folder {out.absolute().parent} does not exist")
    return out


def _summary(out: Path) -> str:
    from tmac_py.lutfile import LutFile

    with LutFile.open(out, check=False) as file:
        linears = [entry for entry in file.tensors.values() if entry.kind == "linear"]
        weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
        bits = sum(entry.nbytes for entry in linears) * 8 / weights
        return f"{out}: {format_bytes(file.nbytes)}, {bits:.3f} bits per weight"


class _Progress:
    """A bar over all weights, on a terminal; a call moves it."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        if self._quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(desc=self._title, total=total, unit="w", unit_scale=True, leave=False)
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(done - self._bar.n)

    def warn(self, text: str) -> None:
        """Print one warning line."""
        if not self._quiet:
            print(f"warning: {text}", file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
