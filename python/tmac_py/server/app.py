"""The HTTP interface: OpenAI's routes and a few of llama-server's, over one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from time import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tmac_py.embedding import OnePooling, Vectors
from tmac_py.generate import Step
from tmac_py.openai_replies import Reply, event
from tmac_py.server.engine import Engine
from tmac_py.server.errors import ApiError, invalid, to_api_error
from tmac_py.server.fields import read_flag
from tmac_py.server.guard import Handler, guarded, read_json
from tmac_py.server.jobs import Request
from tmac_py.server.metrics import CONTENT_TYPE, metrics_text
from tmac_py.server.openai_embeddings import embedding_list
from tmac_py.server.openai_requests import Asked, RequestReader
from tmac_py.server.post import Post
from tmac_py.server.waiting import Submit, T, engine_events

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MAX_ANSWERS = 128
"""To one request, as OpenAI's ``n`` allows."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What the server allows.

    Attributes:
        name: of the model.
        api_keys: one of them has to be sent; empty: none is needed.
        max_body: bytes of a request.
        max_tokens: the most tokens of an answer; -1 = what the context allows.
        timeout: seconds for an answer, waiting included.
        pooling: what makes one vector of a text to embed.
        cors_origins: pages of these origins may use the server.
        hosts: names the server may be called by; empty: any.
    """

    name: str
    api_keys: tuple[str, ...] = ()
    max_body: int = 4 << 20
    max_tokens: int = -1
    timeout: float = 600.0
    pooling: OnePooling = "mean"
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def make_app(engine: Engine, options: ServerOptions) -> Starlette:
    """The ASGI application. The engine stays the caller's, who starts and closes it."""
    return _Server(engine, options).app()


class _Server:
    """The routes."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self._engine = engine
        self._model = engine.model
        self._options = options
        self._reader = RequestReader(
            self._model, options.max_tokens, min(MAX_ANSWERS, engine.capacity)
        )
        self._started = int(time())
        self._post: Post | None = None

    def app(self) -> Starlette:
        """All routes, with what stands before them."""
        options = self._options
        keys = tuple(key.encode() for key in options.api_keys)

        def route(path: str, handler: Handler, method: str, *, open_to_all: bool = False) -> Route:
            return Route(path, guarded(handler, () if open_to_all else keys), methods=[method])

        middleware = []
        if options.hosts:
            middleware.append(
                Middleware(
                    TrustedHostMiddleware, allowed_hosts=list(options.hosts), www_redirect=False
                )
            )
        if options.cors_origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(options.cors_origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                )
            )
        return Starlette(
            routes=[
                route("/", self.page, "GET", open_to_all=True),
                route("/health", self.health, "GET", open_to_all=True),
                route("/v1/health", self.health, "GET", open_to_all=True),
                route("/metrics", self.metrics, "GET"),
                route("/v1/models", self.models, "GET"),
                route("/v1/models/{name:path}", self.one_model, "GET"),
                route("/v1/chat/completions", self.chat, "POST"),
                route("/v1/completions", self.completion, "POST"),
                route("/v1/embeddings", self.embeddings, "POST"),
                route("/tokenize", self.tokenize, "POST"),
                route("/detokenize", self.detokenize, "POST"),
                route("/apply-template", self.apply_template, "POST"),
            ],
            middleware=middleware,
            exception_handlers={HTTPException: _http_error},
        )

    async def page(self, _request: HttpRequest) -> Response:
        """The chat page."""
        page = files("tmac_py.server").joinpath("page.html").read_text("utf-8")
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    async def health(self, _request: HttpRequest) -> Response:
        """Whether requests are answered."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: HttpRequest) -> Response:
        """Prometheus."""
        return Response(metrics_text(self._engine), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, _request: HttpRequest) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def one_model(self, request: HttpRequest) -> Response:
        """The same by name."""
        name = request.path_params["name"]
        if name != self._options.name:
            raise ApiError(
                404,
                f"there is no model {name!r}; the one here is {self._options.name!r}",
                code="model_not_found",
            )
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, object]:
        return {
            "id": self._options.name,
            "object": "model",
            "created": self._started,
            "owned_by": "tmac_py",
            "meta": {
                "n_ctx": self._engine.n_ctx,
                "n_ctx_train": self._model.n_ctx,
                "n_vocab": self._model.config.vocab_size,
                "parallel": self._engine.parallel,
            },
        }

    async def chat(self, request: HttpRequest) -> Response:
        """OpenAI's chat completions."""
        body = await read_json(request, self._options.max_body)
        return await self._answer(
            request, await run_in_threadpool(self._reader.chat, body, _client(request))
        )

    async def completion(self, request: HttpRequest) -> Response:
        """OpenAI's completions."""
        body = await read_json(request, self._options.max_body)
        return await self._answer(
            request, await run_in_threadpool(self._reader.completion, body, _client(request))
        )

    async def embeddings(self, request: HttpRequest) -> Response:
        """OpenAI's embeddings."""
        body = await read_json(request, self._options.max_body)
        texts, in_base64 = await run_in_threadpool(self._reader.embedding, body)
        submit: Submit[list[Vectors]] = partial(
            self._engine.submit_embedding,
            texts,
            pooling=self._options.pooling,
            client=_client(request),
        )
        async with aclosing(self._events(request, [submit])) as events:
            _, vectors = await anext(events)
        n_tokens = sum(map(len, texts))
        return JSONResponse(
            embedding_list(vectors, self._options.name, n_tokens, in_base64=in_base64)
        )

    async def tokenize(self, request: HttpRequest) -> Response:
        """Token ids of a text."""
        body = await read_json(request, self._options.max_body)
        content = body.get("content")
        if not isinstance(content, str):
            raise invalid("content: allowed: a text", "content")
        tokens = await run_in_threadpool(
            self._model.tokenizer.encode,
            content,
            add_special=read_flag(body, "add_special"),
            parse_special=read_flag(body, "parse_special", True),
        )
        return JSONResponse({"tokens": tokens})

    async def detokenize(self, request: HttpRequest) -> Response:
        """Text of token ids."""
        body = await read_json(request, self._options.max_body)
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise invalid("tokens: allowed: a list of token ids", "tokens")
        ids = self._model.check_prompt(tokens).tolist() if tokens else []
        text = await run_in_threadpool(self._model.tokenizer.decode, ids, skip_special=False)
        return JSONResponse({"content": text})

    async def apply_template(self, request: HttpRequest) -> Response:
        """The prompt that messages become."""
        body = await read_json(request, self._options.max_body)
        return JSONResponse({"prompt": await run_in_threadpool(self._reader.chat_text, body)})

    async def _answer(self, request: HttpRequest, asked: Asked) -> Response:
        n_prompts = len(asked.requests) // asked.best_of
        reply = Reply(asked, self._model.tokenizer, self._options.name, n_prompts)
        steps = self._steps(request, asked.requests)
        if not asked.stream:
            answers: list[list[Step]] = [[] for _ in asked.requests]
            async with aclosing(steps):
                async for index, step in steps:
                    answers[index].append(step)
            best, n_discarded = _choose_best(answers, asked.best_of, asked.n)
            return JSONResponse(reply.whole(*best, n_discarded=n_discarded))
        # Errors that are known before the first token still get a status of their own.
        first = await anext(steps)
        return StreamingResponse(
            _server_sent(reply, first, steps),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    def _events(
        self, request: HttpRequest, submits: Sequence[Submit[T]]
    ) -> AsyncGenerator[tuple[int, T], None]:
        """What the engine's thread tells of these jobs (:func:`engine_events`)."""
        loop = asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
        return engine_events(self._engine, self._post, request, self._options.timeout, submits)

    async def _steps(
        self, request: HttpRequest, wanted: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, Step], None]:
        """All answers as they come, each step with the number of its answer."""
        submits: list[Submit[Step]] = [partial(self._engine.submit, one) for one in wanted]
        left = len(wanted)
        async with aclosing(self._events(request, submits)) as events:
            async for index, step in events:
                yield index, step
                left -= step.token.finish_reason is not None
                if left == 0:
                    return


async def _server_sent(
    reply: Reply, first: tuple[int, Step], steps: AsyncIterator[tuple[int, Step]]
) -> AsyncIterator[bytes]:
    """Server-sent events of answers; an error on the way is the last one."""
    try:
        yield b"".join(map(event, reply.opening())) + reply.events(first[1], first[0])
        async for index, step in steps:
            if data := reply.events(step, index):
                yield data
    except Exception as error:
        yield event(to_api_error(error).to_json())
    yield b"data: [DONE]\n\n"


def _choose_best(
    answers: Sequence[list[Step]], best_of: int, n: int
) -> tuple[list[list[Step]], int]:
    """Of each ``best_of`` answers the ``n`` with the highest log probability per token.

    Returns them, and how many tokens the others have.
    """
    chosen: list[list[Step]] = []
    for start in range(0, len(answers), best_of):
        candidates = answers[start : start + best_of]
        chosen += (
            sorted(candidates, key=_mean_logprob, reverse=True)[:n] if best_of > n else candidates
        )
    n_tokens = sum(steps[-1].token.n_gen for steps in answers)
    return chosen, n_tokens - sum(steps[-1].token.n_gen for steps in chosen)


def _mean_logprob(steps: Sequence[Step]) -> float:
    logprobs = [step.token.logprob for step in steps if step.token.n_gen > 0]
    return sum(logprobs) / len(logprobs)


def _client(request: HttpRequest) -> str:
    return request.client.host if request.client else ""


async def _http_error(_request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail).response()
