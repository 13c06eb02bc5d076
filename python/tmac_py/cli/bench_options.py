"""The options of ``tmac bench``, and what they say: workloads, settings, models."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tmac_py.cli.arguments import whole_number
from tmac_py.cli.models import DEFAULT_MODEL, MODEL_HELP, resolve_model
from tmac_py.errors import OptionError
from tmac_py.machine import MAX_THREADS, default_threads
from tmac_py.spec import Tables

if TYPE_CHECKING:
    from tmac_py.benchmark import Setting, Workload

FORMATS = ("md", "json", "jsonl", "csv")
AXES = ("threads", "bits", "isa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac bench``."""
    _add_models(parser.add_argument_group("models"))
    _add_workloads(parser.add_argument_group("what is timed"))
    _add_settings(parser.add_argument_group("how"))
    _add_modes(parser.add_argument_group("in place of a table of rows"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", choices=FORMATS, default="md", help="how to print (default: md)"
    )
    output.add_argument(
        "--plots",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where --sweep writes its pictures, sweep-threads.png and so on (default: here)",
    )
    output.add_argument(
        "--no-plots", action="store_true", help="no pictures: --sweep plots in the terminal only"
    )


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m",
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help=f"{MODEL_HELP}; may be given several times",
    )
    group.add_argument(
        "--synthetic",
        action="append",
        default=[],
        metavar="SHAPE:WEIGHTS",
        help="a known shape with random weights, as llama-2-7b:2bit, or llama-2-7b/8:4bit with 8 "
        "layers; may be given several times",
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="where fetched models are kept, as for tmac run"
    )
    group.add_argument("--offline", action="store_true", help="never fetch a model")


def _add_workloads(group: argparse._ArgumentGroup) -> None:
    for flags, default, text in (
        (("-p", "--n-prompt"), "512", "prompt tokens (0 = no such row)"),
        (("-n", "--n-gen"), "128", "tokens to generate (0 = no such row)"),
        (("-d", "--n-depth"), "0", "tokens in the KV cache before the clock starts"),
    ):
        group.add_argument(
            *flags,
            type=_numbers(0),
            default=_numbers(0)(default),
            metavar="N,...",
            help=f"{text}; several with commas, ranges as 1-8 or 1-8+2 (default: {default})",
        )
    group.add_argument(
        "-pg",
        action="append",
        default=[],
        type=_pair,
        metavar="P,G",
        help="a row of a prompt and an answer together; may be given several times",
    )
    group.add_argument(
        "-r",
        "--repetitions",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="of each row, after one that is not counted (default: 5)",
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-t",
        "--threads",
        type=_numbers(1, MAX_THREADS),
        metavar="N,...",
        help="threads to compute with (default: the performance cores that this process may use)",
    )
    group.add_argument(
        "--isa",
        type=_names,
        metavar="NAME,...",
        help="instruction sets, all for those that run here (tmac info lists them; default: the "
        "best)",
    )
    group.add_argument(
        "--tables",
        type=_names,
        metavar="NAME,...",
        help=f"lookup tables: {', '.join(get_args(Tables))} (default: the model's own)",
    )
    group.add_argument(
        "--kv",
        type=_names,
        default=["f16"],
        metavar="TYPE,...",
        help="how the context is stored: f16, int8 or int4, or keys and values apart as in "
        "int8/int4 (default: f16)",
    )


def _add_modes(group: argparse._ArgumentGroup) -> None:
    modes = group.add_mutually_exclusive_group()
    modes.add_argument(
        "--profile", action="store_true", help="print what the parts of a decode step take"
    )
    modes.add_argument(
        "--sweep",
        type=_axes,
        metavar="AXIS,...",
        help="vary threads, bits or isa, one after the other, and plot the speeds beside the limit "
        "of the machine; bits need --synthetic SHAPE, which then takes 1, 2, 3, 4 and 8, or "
        "several models",
    )
    modes.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="compare two results of -o json (or jsonl) instead of measuring; exit status 1 if the "
        "second is slower somewhere by more than the noise",
    )
    modes.add_argument(
        "--report",
        action="store_true",
        help="a report in Markdown to paste: the machine, its limits, the rows, throttling",
    )


@dataclass(frozen=True)
class BenchModel:
    """A model to measure: its name, and how to get its file."""

    name: str
    path: Path | None
    """None for a synthetic one, which is written when its turn comes."""


def settings(args: argparse.Namespace) -> list[Setting]:
    """All that the lists of the options make.

    Raises OptionError for a name that is not allowed.
    """
    from tmac_py.benchmark import Setting
    from tmac_py.checks import check_kv, check_tables

    for tables in args.tables or []:
        check_tables(tables)
    for kv in args.kv:
        check_kv(kv)
    chosen: list[str | None] = [*isas(args)]
    return [
        Setting(threads, isa, tables, kv)
        for isa in chosen or [None]
        for threads in args.threads or [default_threads()]
        for tables in args.tables or [None]
        for kv in args.kv
    ]


def isas(args: argparse.Namespace) -> list[str]:
    """The instruction sets of ``--isa``, none for the one in use; OptionError for others."""
    usable = usable_isas()
    if args.isa == ["all"]:
        return usable
    for isa in args.isa or []:
        if isa not in usable:
            raise OptionError(f"isa {isa!r} does not run here; allowed: all, {', '.join(usable)}")
    return args.isa or []


def usable_isas() -> list[str]:
    """Those that run here, as ``tmac info`` lists them."""
    from tmac_py import _core

    return [isa["name"] for isa in _core.isas() if isa["usable"]]


def workloads(args: argparse.Namespace) -> list[Workload]:
    """What ``-p``, ``-n``, ``-d`` and ``-pg`` ask for; OptionError if that is nothing."""
    from tmac_py.benchmark import Workload

    found = []
    for depth in args.n_depth:
        found += [Workload(n, 0, depth) for n in args.n_prompt if n]
        found += [Workload(0, n, depth) for n in args.n_gen if n]
        found += [Workload(prompt, answer, depth) for prompt, answer in args.pg]
    if not found:
        raise OptionError("nothing to measure: -p and -n are 0; allowed: one above 0, or -pg")
    return found


def models(args: argparse.Namespace) -> list[BenchModel]:
    """The models that ``-m`` and ``--synthetic`` name, fetched or converted where need be.

    Raises:
        TmacError: one does not exist, or cannot be fetched or converted.
    """
    from tmac_py.synthetic import parse_synthetic

    for text in args.synthetic:
        parse_synthetic(text)
    names = args.model or ([] if args.synthetic else [DEFAULT_MODEL])
    found = [
        BenchModel(
            name, resolve_model(name, cache_dir=args.cache_dir, offline=args.offline, quiet=False)
        )
        for name in names
    ]
    return found + [BenchModel(text, None) for text in args.synthetic]


def files(chosen: Sequence[BenchModel], folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files; synthetic ones are written to ``folder`` in turn, and removed again."""
    from tmac_py.synthetic import write_synthetic

    for model in chosen:
        if model.path is not None:
            yield model.name, model.path
            continue
        path = folder / "synthetic.lut"
        write_synthetic(path, model.name)
        try:
            yield model.name, path
        finally:
            path.unlink(missing_ok=True)  # the folder may have gone before


_MOST_NUMBERS = 1000
"""Of one range: a longer one is a slip."""


def _numbers(low: int, high: int | None = None) -> Callable[[str], list[int]]:
    """An argparse type: whole numbers and ranges as "1,2,4" and "1-8+2", from low to high."""
    allowed = f"from {low} up" if high is None else f"from {low} to {high}"

    def parse(text: str) -> list[int]:
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?:\+(\d{1,9}))?)?", part, re.ASCII)
            first = int(match[1]) if match else -1
            last = int(match[2] or match[1]) if match else -1
            step = int(match[3] or 1) if match else 0
            if first < low or last < first or step < 1 or (high is not None and last > high):
                raise argparse.ArgumentTypeError(
                    f"{text!r} is not allowed; give whole numbers {allowed}, "
                    "as 1,2,4 or 1-8 or 1-8+2"
                )
            numbers = range(first, last + 1, step)
            if len(numbers) > _MOST_NUMBERS:
                raise argparse.ArgumentTypeError(
                    f"{text!r} has {len(numbers)} numbers; allowed: at most {_MOST_NUMBERS}"
                )
            found += numbers
        return list(dict.fromkeys(found))

    return parse


def _names(text: str) -> list[str]:
    """An argparse type: names with commas, each once."""
    return list(dict.fromkeys(text.split(",")))


def _axes(text: str) -> list[str]:
    axes = _names(text)
    if not set(axes) <= set(AXES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; give one or more of {','.join(AXES)}"
        )
    return axes


def _pair(text: str) -> tuple[int, int]:
    """An argparse type: "512,128"."""
    parts = text.split(",")
    if len(parts) != 2 or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give two numbers, as 512,128")
    if sum(map(int, parts)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; one must be above 0")
    return int(parts[0]), int(parts[1])
