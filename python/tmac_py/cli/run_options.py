"""The options of ``tmac run``."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, get_args

from tmac_py.checks import check_variables
from tmac_py.cli.arguments import whole_number
from tmac_py.cli.models import MODEL_HELP
from tmac_py.errors import OptionError
from tmac_py.machine import MAX_THREADS
from tmac_py.spec import Tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac run``."""
    _add_model_arguments(parser)
    _add_prompt_arguments(parser)
    _add_generation_arguments(parser)
    _add_form_arguments(parser)
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
        help=MODEL_HELP,
    )
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same")
    group.add_argument(
        "-t",
        "--threads",
        type=whole_number(1, MAX_THREADS),
        metavar="N",
        help="threads to compute with (default: $TMAC_THREADS, else the performance cores that "
        "this process may use)",
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
        metavar="TYPE",
        help="how the context is stored: f16, int8 or int4, or keys and values apart as in "
        "int8/int4 (default: f16, or that of the prompt cache)",
    )
    group.add_argument(
        "-md",
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the same vocabulary that guesses the next tokens; how many at a "
        "time adapts itself, and the text stays the same",
    )
    group.add_argument(
        "--spec",
        choices=("lookup", "none"),
        help="where guesses come from without one: what followed the same words before, or nowhere "
        "(default: lookup)",
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
        help="where fetched and converted models are kept (default: $TMAC_CACHE, else the user's "
        "cache)",
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
        "and neither -p nor -f is given. On a terminal, without a prompt: a chat",
    )
    source.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    group.add_argument(
        "--system", "-sys", "--system-prompt", metavar="TEXT", help="instructions for a chat model"
    )
    group.add_argument(
        "-cnv",
        "--chat",
        "--conversation",
        action="store_true",
        help="chat; a prompt is the first message, lines of standard input are the next ones",
    )
    group.add_argument(
        "-st",
        "--single-turn",
        action="store_true",
        help="one message and its answer, also on a terminal without a prompt",
    )
    group.add_argument(
        "--raw",
        "-no-cnv",
        "--no-conversation",
        action="store_true",
        help="continue the prompt as it is, without the model's chat template",
    )
    group.add_argument(
        "--chat-template-file",
        metavar="FILE",
        help="use the jinja2 template in FILE in place of the model's",
    )
    group.add_argument(
        "--chat-template-kwargs",
        type=_template_variables,
        default={},
        metavar="JSON",
        help="variables for the template, as '{\"enable_thinking\": false}'",
    )
    group.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="keep what was computed of the prompt in FILE; a prompt that begins alike goes on "
        "from there",
    )
    group.add_argument(
        "--prompt-cache-all", action="store_true", help="the answers, and a whole chat, as well"
    )
    group.add_argument(
        "--prompt-cache-ro", action="store_true", help="use FILE as it is, never write it"
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


def _add_form_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("form of the answer (needs tmac_py[grammar])")
    form = group.add_mutually_exclusive_group()
    form.add_argument("-j", "--json-schema", metavar="JSON", help="JSON of this schema; {} = any")
    form.add_argument("-jf", "--json-schema-file", metavar="FILE", help="the schema is in FILE")
    form.add_argument(
        "--regex", metavar="REGEX", help="a text that matches as a whole, in Rust's syntax"
    )
    form.add_argument("--grammar", metavar="LARK", help="a text of this Lark grammar")
    form.add_argument("--grammar-file", metavar="FILE", help="the grammar is in FILE")


def _logit_bias(text: str) -> tuple[int, float]:
    """An argparse type: token id and number of "15043+1.5"."""
    found = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", text)
    if found is None or found[2] == "+inf":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; give a token id and what to add, as 15043+1 or 15043-inf"
        )
    return int(found[1]), float(found[2])


def _template_variables(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object of names that a template may read."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    try:
        return check_variables(value)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
