"""``tmac run``: answer a prompt, or chat. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmac_py.cli.arguments import decode_text
from tmac_py.cli.lineinput import on_terminal
from tmac_py.cli.models import model_name, needs_check, resolve_model
from tmac_py.cli.run_options import add_arguments
from tmac_py.errors import TmacError

if TYPE_CHECKING:
    from tmac_py.model import Model
    from tmac_py.session import Session

__all__ = ["add_arguments", "execute"]


def execute(args: argparse.Namespace) -> int:
    """Answer the prompt or chat; returns the exit status: 0, or 130 after Ctrl-C."""
    name = model_name(args.model, args.model_option)
    _check_combinations(args)
    chatting = args.chat or (_on_terminal(args) and not args.json)
    prompt = None if chatting and args.prompt is args.file is None else _read_prompt(args)
    sampling = _sampling_options(args)
    _check_prompt_cache(args)
    template = None
    if args.chat_template_file is not None:
        template = decode_text(Path(args.chat_template_file).read_bytes(), args.chat_template_file)
    where = {"cache_dir": args.cache_dir, "offline": args.offline, "quiet": args.quiet}
    path = resolve_model(name, **where)
    draft_path = args.draft_model and resolve_model(args.draft_model, **where)

    from tmac_py.model import Model

    check = needs_check(name) and not args.no_check
    load = {"threads": args.threads, "tables": args.tables, "check": check}
    with Model.load(path, chat_template=template, **load) as model:
        options = {"max_tokens": args.max_tokens, "stop": args.stop, "draft": args.spec, **sampling}
        with _draft_model(draft_path, args) as draft:
            if draft is not None:
                options["draft"] = draft
            if chatting:
                return _chat(model, name, prompt, options, args)
            assert prompt is not None
            return _answer(model, name, prompt, options, args)


def _answer(
    model: Model, name: str, prompt: str, options: dict[str, Any], args: argparse.Namespace
) -> int:
    """One answer."""
    from tmac_py.cli.answer import Answer

    chat, ids = _prompt_ids(model, prompt, args)
    answer = Answer(n_prompt=len(ids))
    n_ctx = args.ctx_size
    if n_ctx == 0 and args.max_tokens != -1 and args.prompt_cache is None:
        n_ctx = min(model.n_ctx, len(ids) + args.max_tokens)
    session = _session(model, n_ctx, args)
    stream = session.stream(ids, trim_space=chat, progress=answer.prefilled, **options)
    with closing(stream):
        answer.collect(stream, show=None if args.json else _show)
    if args.json:
        print(
            json.dumps(
                answer.to_json(name, ids, options["seed"]), ensure_ascii=not _stdout_is_utf8()
            )
        )
    elif not answer.text.endswith("\n"):
        print(flush=True)
    if not args.quiet:
        print(answer.statistics(), file=sys.stderr)
    _keep(session, len(ids), args)
    return 130 if answer.interrupted else 0


def _chat(
    model: Model, name: str, prompt: str | None, options: dict[str, Any], args: argparse.Namespace
) -> int:
    """A conversation until the user leaves."""
    from tmac_py.cli.chat import ChatProgram, greet
    from tmac_py.conversation import open_conversation

    session = _session(model, args.ctx_size, args)
    conversation = open_conversation(
        model, session, system=args.system, variables=args.chat_template_kwargs, raw=args.raw
    )
    if not args.quiet and on_terminal():
        greet(conversation, name, model.threads)
    program = ChatProgram(conversation, options, quiet=args.quiet)
    status = program.run(prompt, single=args.single_turn)
    _keep(conversation.session, program.n_first_prompt, args)
    return status


@contextmanager
def _draft_model(path: Path | None, args: argparse.Namespace) -> Iterator[Model | None]:
    if path is None:
        yield None
        return
    from tmac_py.model import Model

    with Model.load(path, threads=args.threads, check=not args.no_check) as draft:
        yield draft


def _session(model: Model, n_ctx: int, args: argparse.Namespace) -> Session:
    """An empty session, or what the prompt cache holds."""
    from tmac_py.session import Session

    if args.prompt_cache is not None and Path(args.prompt_cache).exists():
        return Session.load(model, args.prompt_cache, n_ctx=n_ctx, kv=args.kv)
    return model.new_session(n_ctx, args.kv or "f16")


def _keep(session: Session, n_prompt: int, args: argparse.Namespace) -> None:
    """Write the prompt cache: the prompt, or all."""
    if args.prompt_cache is None or args.prompt_cache_ro:
        return
    if not args.prompt_cache_all:
        session.truncate(min(n_prompt, len(session.ids)))
    session.save(args.prompt_cache)


def _check_combinations(args: argparse.Namespace) -> None:
    """TmacError for options that contradict each other."""
    if args.system is not None and args.raw:
        raise TmacError("--system needs the chat template, which --raw leaves out")
    if args.chat and args.json:
        raise TmacError("--json prints one answer: it does not go with --chat")
    if args.draft_model is not None and args.spec is not None:
        raise TmacError("--spec is for guesses without a --draft-model: give one of them")


def _check_prompt_cache(args: argparse.Namespace) -> None:
    """TmacError for a prompt cache that cannot be used, before the work and not after it."""
    if args.prompt_cache is None:
        if args.prompt_cache_all or args.prompt_cache_ro:
            raise TmacError("--prompt-cache-all and --prompt-cache-ro need --prompt-cache FILE")
        return
    path = Path(args.prompt_cache)
    if args.prompt_cache_all and args.prompt_cache_ro:
        raise TmacError("--prompt-cache-ro writes nothing: it does not go with --prompt-cache-all")
    if args.prompt_cache_ro and not path.exists():
        raise TmacError(f"{path}: no such file, and --prompt-cache-ro makes none")
    if not path.absolute().parent.is_dir():
        raise TmacError(f"{path}: the folder {path.absolute().parent} does not exist")


def _on_terminal(args: argparse.Namespace) -> bool:
    """Whether someone sits there who gave no prompt."""
    given = args.prompt is not None or args.file is not None
    return not given and on_terminal() and sys.stdout.isatty()


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt from -p, -f or standard input, the newline at the end of a file left out."""
    if args.prompt is not None and args.prompt != "-":
        text: str = args.prompt
    elif args.file is not None and args.file != "-":
        text = decode_text(Path(args.file).read_bytes(), args.file)
    elif sys.stdin is None or (args.prompt is None and args.file is None and on_terminal()):
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
    return True, model.chat_prompt(messages, **args.chat_template_kwargs)


def _stdout_is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
