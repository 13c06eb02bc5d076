"""``tmac run``: answer one prompt. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tmac_py.cli.arguments import decode_text, whole_number
from tmac_py.cli.models import DEFAULT_MODEL, model_name, resolve_model
from tmac_py.errors import TmacError
from tmac_py.machine import MAX_THREADS
from tmac_py.spec import Tables

if TYPE_CHECKING:
    from tmac_py.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac run``."""
    _add_model_arguments(parser)
    _add_prompt_arguments(parser)
    _add_generation_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, token ids, finish reason, timings",
    )
    output.add_argument("-q", "--quiet", action="store_true", help="no progress, no statistics")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a .lut file, or the name of a model to fetch (default: {DEFAULT_MODEL})",
    )
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same")
    group.add_argument(
        "-t",
        "--threads",
        type=whole_number(1, MAX_THREADS),
        metavar="N",
        help="threads to compute with (default: the performance cores that this process may use)",
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="tokens of context, prompt and answer together (0 = what they need, within what the "
        "model allows)",
    )
    group.add_argument(
        "--kv",
        default="f16",
        metavar="TYPE",
        help="how the context is stored: f16, int8 or int4, or keys and values apart as in "
        "int8/int4 (default: f16)",
    )
    group.add_argument(
        "--tables",
        choices=get_args(Tables),
        help="lookup tables of 8 bits, or exact sums of activations rounded to 14 bits, which are "
        "slower, or to 8 bits per token (default: exact8 for BitNet models, int8 for others)",
    )
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where fetched models are kept (default: $TMAC_CACHE, else the user's cache)",
    )
    group.add_argument("--offline", action="store_true", help="never fetch a model")
    group.add_argument(
        "--no-check", action="store_true", help="do not compare the file with its checksums"
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the prompt; - reads standard input, which is also read when it is not a terminal "
        "and neither -p nor -f is given",
    )
    source.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    group.add_argument(
        "--system", "-sys", "--system-prompt", metavar="TEXT", help="instructions for a chat model"
    )
    group.add_argument(
        "--raw",
        "-no-cnv",
        action="store_true",
        help="continue the prompt as it is, without the model's chat template",
    )


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n",
        "--n-predict",
        "--max-tokens",
        "--predict",
        dest="max_tokens",
        type=whole_number(1, unlimited=True),
        default=-1,
        metavar="N",
        help="the most tokens to generate (default: -1 = until the answer ends or the context is "
        "full)",
    )
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        metavar="T",
        help="randomness; 0 always takes the most likely token (default: the model's, else 0.8)",
    )
    for name, kind, default, text in (
        ("top-k", int, "the model's, else 40", "choose among the N most likely tokens (0 = all)"),
        (
            "top-p",
            float,
            "the model's, else 0.95",
            "choose among the likeliest tokens that make up N (1 = all)",
        ),
        (
            "min-p",
            float,
            "the model's, else 0.05",
            "drop tokens below N times the likeliest one's probability (0 = off)",
        ),
        (
            "repeat-penalty",
            float,
            "the model's, else 1",
            "make recent tokens less likely (1 = off)",
        ),
        (
            "repeat-last-n",
            int,
            "64, or -1 if the model has a penalty",
            "tokens the penalties look back at (0 = none, -1 = all)",
        ),
        ("presence-penalty", float, "0", "taken off the logit of every recent token (0 = off)"),
        ("frequency-penalty", float, "0", "the same for each time it occurs (0 = off)"),
    ):
        group.add_argument(
            f"--{name}",
            type=kind,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        "-l",
        "--logit-bias",
        type=_logit_bias,
        action="append",
        default=[],
        metavar="ID(+|-)VALUE",
        help="add to the logit of a token, as 15043+1 or 15043-1; 15043-inf forbids it; may be "
        "given several times",
    )
    group.add_argument(
        "-s",
        "--seed",
        type=whole_number(0, unlimited=True),
        default=-1,
        metavar="N",
        help="the same seed gives the same answer (default: -1 = a random one)",
    )
    group.add_argument(
        "--stop",
        "-r",
        "--reverse-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )


def execute(args: argparse.Namespace) -> int:
    """Answer the prompt; returns the exit status: 0, or 130 after Ctrl-C."""
    name = model_name(args.model, args.model_option)
    prompt = _read_prompt(args)
    sampling = _sampling_options(args)
    path = resolve_model(name, cache_dir=args.cache_dir, offline=args.offline, quiet=args.quiet)

    from tmac_py.cli.answer import Answer
    from tmac_py.model import Model

    with Model.load(
        path, threads=args.threads, tables=args.tables, check=not args.no_check
    ) as model:
        chat, ids = _prompt_ids(model, prompt, args)
        answer = Answer(n_prompt=len(ids))
        stream = model.stream(
            ids,
            max_tokens=args.max_tokens,
            n_ctx=args.ctx_size,
            kv=args.kv,
            stop=args.stop,
            trim_space=chat,
            progress=answer.prefilled,
            **sampling,
        )
        with closing(stream):
            answer.collect(stream, show=None if args.json else _show)
    if args.json:
        print(
            json.dumps(
                answer.to_json(name, ids, sampling["seed"]), ensure_ascii=not _stdout_is_utf8()
            )
        )
    elif not answer.text.endswith("\n"):
        print(flush=True)
    if not args.quiet:
        print(answer.statistics(), file=sys.stderr)
    return 130 if answer.interrupted else 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt from -p, -f or standard input, the newline at the end of a file left out."""
    if args.system is not None and args.raw:
        raise TmacError("--system needs the chat template, which --raw leaves out")
    if args.prompt is not None and args.prompt != "-":
        text: str = args.prompt
    elif args.file is not None and args.file != "-":
        text = decode_text(Path(args.file).read_bytes(), args.file)
    elif sys.stdin is None or (args.prompt is None and args.file is None and sys.stdin.isatty()):
        raise TmacError("no prompt: give one with -p/--prompt, -f/--file or on standard input")
    else:
        text = decode_text(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise TmacError(
            "the prompt is empty: give text with -p/--prompt, -f/--file or on standard input"
        )
    return text


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that choose tokens, checked, with a seed in any case."""
    from tmac_py.generate import check_stop
    from tmac_py.sampling import SamplingParams, new_seed

    check_stop(args.stop)
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "repeat_last_n": args.repeat_last_n,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "logit_bias": dict(args.logit_bias),
        "seed": new_seed() if args.seed < 0 else args.seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    SamplingParams(**given)
    return given


def _prompt_ids(model: Model, prompt: str, args: argparse.Namespace) -> tuple[bool, list[int]]:
    """Whether the chat template applies, and the ids of the prompt."""
    if args.raw or model.chat_template is None:
        if args.system is not None:
            raise TmacError("--system needs a chat template, and this model has none")
        return False, model.tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return True, model.chat_prompt(messages)


def _logit_bias(text: str) -> tuple[int, float]:
    """An argparse type: token id and number of "15043+1.5"."""
    found = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", text)
    if found is None or found[2] == "+inf":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; give a token id and what to add, as 15043+1 or 15043-inf"
        )
    return int(found[1]), float(found[2])


def _stdout_is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
