"""``tmac eval``: perplexity, divergence from a reference, flipped answers."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tmac_py.cli.arguments import whole_number
from tmac_py.cli.models import MODEL_HELP, model_name, resolve_model
from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.errors import OptionError
from tmac_py.machine import MAX_THREADS
from tmac_py.spec import Tables

if TYPE_CHECKING:
    from tmac_py.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac eval``."""
    _add_model_arguments(parser)
    _add_task_arguments(parser)
    _add_reference_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="note what is done in FILE, and go on from there if it exists",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same")
    group.add_argument(
        "-t",
        "--threads",
        type=whole_number(1, MAX_THREADS),
        metavar="N",
        help="threads to compute with (default: the performance cores that this process may use)",
    )
    group.add_argument("--tables", choices=get_args(Tables), help="lookup tables, as for tmac run")
    group.add_argument(
        "--kv",
        default="f16",
        metavar="TYPE",
        help="how the context is stored, as for tmac run (default: f16)",
    )
    group.add_argument(
        "-ub",
        "--ubatch-size",
        type=whole_number(1),
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens that go through the model at once; up to 16 get the arithmetic of an answer's "
        f"tokens, more that of a prompt's (default: {PREFILL_CHUNK})",
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="where fetched models are kept, as for tmac run"
    )
    group.add_argument("--offline", action="store_true", help="never fetch a model")
    group.add_argument(
        "--no-check", action="store_true", help="do not compare files with their checksums"
    )


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to evaluate on")
    task = group.add_mutually_exclusive_group()
    task.add_argument(
        "-f", "--file", metavar="FILE", help="a UTF-8 text: perplexity as llama-perplexity has it"
    )
    task.add_argument(
        "--multiple-choice",
        metavar="FILE",
        help='JSON lines with "question", "choices" and "answer" (its index): accuracy',
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=whole_number(4),
        metavar="N",
        help="cut the text into chunks of N tokens; the second half of each counts (default: 512)",
    )
    group.add_argument(
        "--ppl-stride",
        type=whole_number(0),
        metavar="N",
        help="start a chunk every N tokens; the last N of each count (default: 0 = no overlap)",
    )
    group.add_argument(
        "--chunks",
        type=whole_number(1),
        metavar="N",
        help="only the first N chunks or questions (default: all)",
    )


def _add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference")
    reference = group.add_mutually_exclusive_group()
    reference.add_argument(
        "--reference",
        metavar="MODEL",
        help="another model: KL divergence and equal top tokens, or flipped answers",
    )
    reference.add_argument(
        "--kl-base",
        metavar="FILE",
        help="the same for a text, from a file of --save-logits; -f may be left out",
    )
    reference.add_argument(
        "--save-logits",
        type=Path,
        metavar="FILE",
        help="write the log probabilities along the text, 2 bytes for each token of the vocabulary",
    )
    group.add_argument(
        "--reference-tables",
        choices=get_args(Tables),
        help="lookup tables of --reference (default: those it was made for)",
    )


def execute(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    _check_options(args)
    name = model_name(args.model, args.model_option)
    from tmac_py.checks import check_kv

    check_kv(args.kv)
    with ExitStack() as stack:
        model = stack.enter_context(_load(args, name, args.tables))
        reference = None
        if args.reference is not None:
            reference = stack.enter_context(_load(args, args.reference, args.reference_tables))
        if args.multiple_choice is not None:
            from tmac_py.cli.eval_choices import evaluate_choices

            values, report = evaluate_choices(args, model, reference)
        else:
            from tmac_py.cli.eval_text import evaluate_text

            values, report = evaluate_text(args, model, reference)
        facts = {"model": name, "tables": model.tables, "kv": args.kv, "batch": args.ubatch_size}
        if reference is not None:
            facts |= {"reference": args.reference, "reference_tables": reference.tables}
    print(json.dumps({**facts, **values}, indent=2) if args.json else report)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """OptionError for options that do not go together, before anything is loaded."""
    if args.file is None and args.multiple_choice is None and args.kl_base is None:
        raise OptionError("nothing to evaluate on: give a text with -f, or --multiple-choice")
    if args.multiple_choice is not None:
        for option in ("ctx_size", "ppl_stride", "kl_base", "save_logits"):
            if getattr(args, option) is not None:
                flag = {"ctx_size": "-c"}.get(option, f"--{option.replace('_', '-')}")
                raise OptionError(f"{flag} is for texts, not for --multiple-choice")
    if args.reference_tables is not None and args.reference is None:
        raise OptionError("--reference-tables needs --reference")


def _load(args: argparse.Namespace, name: str, tables: Tables | None) -> Model:
    from tmac_py.model import Model

    path = resolve_model(name, cache_dir=args.cache_dir, offline=args.offline, quiet=args.quiet)
    return Model.load(path, threads=args.threads, tables=tables, check=not args.no_check)
