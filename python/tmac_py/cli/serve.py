"""``tmac serve``: answer over HTTP, in OpenAI's conventions."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn, get_args

from tmac_py.cli.models import MODEL_HELP, model_name, resolve_model
from tmac_py.embedding import OnePooling
from tmac_py.errors import TmacError
from tmac_py.spec import Tables

KEY_VARIABLE = "TMAC_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac serve``."""
    _add_model_arguments(parser.add_argument_group("model"))
    _add_engine_arguments(parser.add_argument_group("clients"))
    _add_network_arguments(parser.add_argument_group("network"))
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing but errors and warnings"
    )


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same")
    group.add_argument(
        "-a",
        "--alias",
        metavar="NAME",
        help="what clients know it as (default: its own)",
    )
    group.add_argument(
        "-t",
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the performance cores that this process may use)",
    )
    group.add_argument(
        "--tables", choices=get_args(Tables), help="kind of lookup tables, see tmac run"
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


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-np",
        "--parallel",
        type=int,
        default=8,
        metavar="N",
        help="answers that are computed at the same time; the others wait (default: 8)",
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=0,
        metavar="N",
        help="tokens of context for each answer, prompt included (default: 0 = all the model "
        "allows)",
    )
    group.add_argument(
        "--kv",
        default="f16",
        metavar="TYPE",
        help="how the context is stored: f16, int8 or int4, or keys and values apart as in "
        "int8/int4 (default: f16)",
    )
    group.add_argument(
        "-ub",
        "--ubatch-size",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a new prompt that are computed between two tokens of the answers under way "
        "(default: 64)",
    )
    group.add_argument(
        "-n",
        "--n-predict",
        "--max-tokens",
        "--predict",
        dest="max_tokens",
        type=int,
        default=-1,
        metavar="N",
        help="the most tokens of an answer, whatever a client asks for (default: -1 = what the "
        "context allows)",
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more are refused with status 429 (default: 256)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for an answer, waiting included (default: 600)",
    )
    group.add_argument(
        "--pooling",
        choices=get_args(OnePooling),
        default="mean",
        help="what makes one vector of a text to embed: the mean over its tokens, that of the last "
        "or of the first (default: mean)",
    )
    group.add_argument(
        "--draft",
        choices=("lookup", "none"),
        default="lookup",
        help="how the next tokens of the one answer under way are guessed: what followed the last "
        "few before, or not at all; no answer depends on it (default: lookup)",
    )


def _add_network_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1: this machine only)",
    )
    group.add_argument(
        "--port", type=int, default=8080, metavar="N", help="(default: 8080; 0 = a free one)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="clients have to send one of these; may be given several times. Other users of this "
        f"machine can see it: better ${KEY_VARIABLE}, or --api-key-file",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="the same, a key a line")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use the server, as https://example.org; may be given "
        "several times",
    )
    group.add_argument(
        "--max-body",
        type=int,
        default=4 << 20,
        metavar="BYTES",
        help="size of a request (default: 4 MiB)",
    )
    group.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="for answers under way when the server is told to end (default: 5)",
    )


def execute(args: argparse.Namespace) -> int:
    """Serve until told to end: status 0 after SIGTERM, 130 after Ctrl-C."""
    _check(args)
    keys = _api_keys(args)
    name = model_name(args.model, args.model_option)
    try:
        from tmac_py.server.app import ServerOptions, make_app
        from tmac_py.server.run import bind, is_loopback, serve
    except ModuleNotFoundError as error:
        raise TmacError(
            f"{error.name} is not installed; the server needs: pip install 'tmac_py[serve]'"
        ) from error
    from tmac_py.model import Model
    from tmac_py.server.engine import Engine

    local = is_loopback(args.host)
    _end_quietly()
    with bind(args.host, args.port) as listener:
        path = resolve_model(name, cache_dir=args.cache_dir, offline=args.offline, quiet=args.quiet)
        with Model.load(
            path, threads=args.threads, tables=args.tables, check=not args.no_check
        ) as model:
            model.tokenizer  # noqa: B018 - a file without one cannot be served
            engine = Engine(
                model,
                parallel=args.parallel,
                n_ctx=args.ctx_size,
                kv=args.kv,
                chunk=args.ubatch_size,
                max_queue=args.max_queue,
                guess=args.draft == "lookup",
            )
            options = ServerOptions(
                name=args.alias or _known_as(name),
                api_keys=keys,
                max_body=args.max_body,
                max_tokens=args.max_tokens,
                timeout=args.timeout,
                pooling=args.pooling,
                cors_origins=tuple(args.cors_origin),
                hosts=("127.0.0.1", "localhost", "[::1]", args.host) if local else (),
            )

            def started() -> None:
                if not local and not keys:
                    _say(args, "warning: anybody who reaches this address may use it (--api-key)")
                if not args.quiet:
                    url = f"http://{args.host}:{listener.getsockname()[1]}"
                    _say(args, f"{options.name} at {url}, {engine.parallel} answers at a time")

            engine.start()
            try:
                serve(
                    make_app(engine, options),
                    listener,
                    grace=args.grace,
                    started=started,
                    cut=engine.close,
                )
            finally:
                engine.close()
    return 0


def _known_as(model: str) -> str:
    """What clients get to know of a model's name: of a path no more than the end."""
    path = Path(model)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.exists() else model


def _check(args: argparse.Namespace) -> None:
    """TmacError for numbers that are not allowed and that nothing else checks."""
    for name, value, allowed in (
        ("--port", 0 <= args.port <= 65535, "0 to 65535"),
        ("--max-body", args.max_body >= 1, "1 up"),
        ("--timeout", 0 < args.timeout < 1e9, "above 0"),
        ("--grace", 0 <= args.grace < 1e9, "0 up"),
        ("--max-tokens", args.max_tokens == -1 or args.max_tokens >= 1, "1 up, or -1"),
    ):
        if not value:
            raise TmacError(f"{name}: allowed: {allowed}")


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if args.api_key_file is not None:
        lines = Path(args.api_key_file).read_text("utf-8").splitlines()
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise TmacError(f"{args.api_key_file}: no API key in it")
        keys += from_file
    if not all(key.strip() for key in keys):
        raise TmacError("an API key is empty")
    return tuple(keys)


def _end_quietly() -> None:
    """SIGTERM is the usual way to end a server: status 0."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)


def _say(args: argparse.Namespace, text: str) -> None:
    print(f"{args.prog}: {text}", file=sys.stderr, flush=True)
