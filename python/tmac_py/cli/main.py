"""The program ``tmac`` and the short names of its subcommands; errors become one line here.

Exit status: 0 done, 1 a difference that was asked for, 2 an error (one line on stderr), 130 ended
by Ctrl-C, 141 the reader of stdout went away, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from tmac_py.errors import TmacError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """One subcommand: module ``tmac_py.cli.<name>`` has ``add_arguments`` and ``execute``."""

    name: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = (
    Command(
        "run",
        "answer a prompt with a language model, or chat with it",
        (
            "tmac run",
            "tmac run model.lut --chat --system 'Answer in one sentence.'",
            'tmac run --prompt "Why is the sky blue?"',
            'tmac run model.lut -p "Once upon a time" --raw -n 64 --temp 0',
            "git diff | tmac run model.lut --system 'Summarise this change.'",
            "tmac run -f question.txt --json --seed 1 > answer.json",
            "tmac run someone/SmolLM2-135M-GGUF:Q4_K_M -p Hello",
            "tmac run model.lut -f long.txt --prompt-cache long.cache -n 64",
            "tmac run large.lut --draft-model small.lut -p 'Count to ten.'",
        ),
    ),
    Command(
        "convert",
        "convert a GGUF file, a Hugging Face folder or one on the hub to a .lut file",
        (
            "tmac convert model.Q4_1.gguf model.lut",
            "tmac convert model.Q8_0.gguf model.lut --head-bits 6",
            "tmac convert HuggingFaceTB/SmolLM2-135M-Instruct model.lut --bits 4",
            "tmac convert someone/SmolLM2-135M-GGUF:Q4_K_M model.lut",
            "tmac convert ./SmolLM2-135M-Instruct-GPTQ model.lut --verify",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --bits 4 --group-size 64",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant rtn --bits 8 --no-asym",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant mse --bits-for down_proj=6",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant hqq --bits 4",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant bcq --bits 2 --group-size 64",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant gptq --target-bpw 4.5",
            "tmac convert ./SmolLM2-135M-Instruct model.lut --quant awq --calibration-tokens 2048",
        ),
    ),
    Command(
        "bench",
        "measure how fast a model runs, beside what the machine allows",
        (
            "tmac bench",
            "tmac bench -m model.lut -p 512 -n 128 -t 1,2,4",
            "tmac bench -m model.lut --isa all --kv f16,int8 --tables int8,exact -o csv",
            "tmac bench --synthetic llama-2-7b:2bit -p 0 -d 0,2048",
            "tmac bench --synthetic llama-2-7b/4 --sweep bits",
            "tmac bench -m model.lut --sweep threads,isa --no-plots",
            "tmac bench -m model.lut -r 10 -o json > before.json",
            "tmac bench --compare before.json after.json",
            "tmac bench --report > report.md",
        ),
    ),
    Command(
        "eval",
        "measure how well a model predicts a text or answers, and how far it is from another",
        (
            "tmac eval model.lut -f text.txt",
            "tmac eval model-2bit.lut -f text.txt --reference model.lut --resume state.jsonl",
            "tmac eval model.lut -f text.txt -c 1024 --save-logits base.logits",
            "tmac eval model-2bit.lut --kl-base base.logits --json",
            "tmac eval model-2bit.lut --multiple-choice questions.jsonl --reference model.lut",
        ),
    ),
    Command(
        "serve",
        "answer over HTTP as OpenAI does, several clients at a time",
        (
            "tmac serve",
            "tmac serve model.lut --port 8000 --parallel 16 -c 4096",
            "TMAC_API_KEY=secret tmac serve model.lut --host 0.0.0.0",
            "tmac serve model.lut --max-tokens 512 --timeout 60 --kv int8",
            "tmac serve embedder.lut --pooling last",
        ),
    ),
    Command(
        "inspect",
        "show, check and export what a .lut file holds",
        (
            "tmac inspect model.lut",
            "tmac inspect model.lut --tensors --json > model.json",
            "tmac inspect new.lut --diff old.lut",
            "tmac inspect model.lut --export folder --tensor 'model.layers.0.*'",
        ),
    ),
    Command(
        "info",
        "show what this installation and this machine can do",
        ("tmac info", "tmac info --json"),
    ),
    Command(
        "completion",
        "print a script that completes the commands and options of all programs in a shell",
        (
            'eval "$(tmac completion bash)"        # in ~/.bashrc',
            'eval "$(tmac completion zsh)"         # in ~/.zshrc, after compinit',
            "tmac completion fish | source         # in ~/.config/fish/config.fish",
        ),
    ),
)

EXIT_STATUS = """exit status:
  0 done, 1 a difference (inspect --diff) or a slower row (bench --compare), 2 an error (one line
  on standard error), 130 ended by Ctrl-C, 141 the reader of standard output went away, 128 + N
  ended by signal N"""


def main(argv: Sequence[str] | None = None) -> int:
    """``tmac``: one program, a subcommand each. Returns the exit status."""
    return _execute(main_parser(), argv)


def main_parser() -> argparse.ArgumentParser:
    """The parser of ``tmac`` with all its subcommands."""
    parser = _Parser(
        prog="tmac",
        description="Low-bit language models on the CPU.",
        epilog=f"examples:\n  tmac run\n  tmac bench --help\n  tmac info\n\n{EXIT_STATUS}",
    )
    _add_common(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        texts = _texts(command, f"tmac {command.name}")
        _declare(command, commands.add_parser(command.name, help=command.summary, **texts))
    return parser


def program_parser(name: str) -> argparse.ArgumentParser:
    """The parser of ``tmac-NAME``."""
    command = next(command for command in COMMANDS if command.name == name)
    parser = _Parser(prog=f"tmac-{name}", **_texts(command, f"tmac-{name}"))
    _declare(command, parser)
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """``tmac-run``, short for ``tmac run``. Returns the exit status."""
    return _single("run", argv)


def convert(argv: Sequence[str] | None = None) -> int:
    """``tmac-convert``, short for ``tmac convert``. Returns the exit status."""
    return _single("convert", argv)


def bench(argv: Sequence[str] | None = None) -> int:
    """``tmac-bench``, short for ``tmac bench``. Returns the exit status."""
    return _single("bench", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``tmac-eval``, short for ``tmac eval``. Returns the exit status."""
    return _single("eval", argv)


def serve(argv: Sequence[str] | None = None) -> int:
    """``tmac-serve``, short for ``tmac serve``. Returns the exit status."""
    return _single("serve", argv)


def inspect(argv: Sequence[str] | None = None) -> int:
    """``tmac-inspect``, short for ``tmac inspect``. Returns the exit status."""
    return _single("inspect", argv)


def info(argv: Sequence[str] | None = None) -> int:
    """``tmac-info``, short for ``tmac info``. Returns the exit status."""
    return _single("info", argv)


class _Parser(argparse.ArgumentParser):
    """Options must be spelled out, and an error is one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _ShowVersion(argparse.Action):
    """Prints the version and the instruction set in use."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from tmac_py import _core

        print(f"{parser.prog} {_core.__version__} ({_core.active_isa()})")
        parser.exit()


def _single(name: str, argv: Sequence[str] | None) -> int:
    return _execute(program_parser(name), argv)


def _texts(command: Command, prog: str) -> dict[str, Any]:
    """Description and epilog of a command that is called as ``prog``."""
    examples = [line.replace(f"tmac {command.name}", prog) for line in command.examples]
    return {
        "description": f"{command.summary[0].upper()}{command.summary[1:]}.",
        "epilog": "examples:\n  " + "\n  ".join(examples) + f"\n\n{EXIT_STATUS}",
    }


def _declare(command: Command, parser: argparse.ArgumentParser) -> None:
    module = import_module(f"tmac_py.cli.{command.name}")
    module.add_arguments(parser)
    _add_common(parser)
    parser.set_defaults(execute=module.execute, prog=parser.prog)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v",
        "--version",
        action=_ShowVersion,
        nargs=0,
        help="show the version and the instruction set in use, and exit",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show where an error arises (traceback)",
    )


def _execute(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and run; every error that is not a fault of this program becomes one line."""
    args = argparse.Namespace(prog=parser.prog, debug=False)
    _open_missing_streams()
    _clean_up_when_told_to_end()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still shows text
    try:
        _check_environment()
        parser.parse_args(argv, namespace=args)
        status: int = args.execute(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except (TmacError, OSError, MemoryError) as error:
        if args.debug:
            raise
        print(f"{args.prog}: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        _let_go_of_stdout()


def _open_missing_streams() -> None:
    """Python has no sys.stdout or sys.stderr where the caller closed them: write to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _clean_up_when_told_to_end() -> None:
    """Let SIGTERM and SIGHUP unwind the program, so that no half-written file stays behind."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        with contextlib.suppress(ValueError):  # a program that calls main() in another thread
            if signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
                signal.signal(getattr(signal, name), end)


def _check_environment() -> None:
    """TmacError if TMAC_ISA names an instruction set that does not run here."""
    if os.environ.get("TMAC_ISA"):
        from tmac_py import _core

        try:
            _core.active_isa()
        except ValueError as error:
            raise TmacError(str(error)) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _let_go_of_stdout() -> None:
    """Without a reader or room on the disk, keep the interpreter from complaining once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
