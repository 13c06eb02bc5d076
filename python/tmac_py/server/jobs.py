"""One client's request in the engine: what is asked for, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from tmac_py.decoding import Ids, Logits
from tmac_py.errors import TmacError
from tmac_py.generate import AnswerText, Step, Timings, Token
from tmac_py.sampling import Sampler, top_logprobs
from tmac_py.server.prompt_scores import PromptScores
from tmac_py.speculative import PromptLookup, Speculation
from tmac_py.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from tmac_py.model import Model


Reuse = Literal["any", "same bits", "none"]


class CancelledError(TmacError):
    """The request was cancelled before its answer was complete."""


class BusyError(TmacError):
    """So many requests wait that no more are taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What one client asks for.

    Attributes:
        prompt: ids int32 [n], n >= 1, within the vocabulary.
        sampler: chooses the tokens; of this request alone.
        max_tokens: at least 1, or -1: until the context is full.
        stop: strings that end the answer and are not shown.
        top_logprobs: alternatives to report for each token.
        trim_space: drop the space with which SentencePiece vocabularies begin an answer.
        score_prompt: report the prompt's tokens first, as steps with ``n_gen`` 0; nothing of it is
            then taken over.
        reuse: what may be taken over of a prompt's beginning that a slot holds: "any" of it, whose
            last bits may differ where it was computed in other portions; only what has the "same
            bits" as computed anew, so that equal requests get equal answers; or "none".
        client: requests of different clients take turns.
    """

    prompt: Ids
    sampler: Sampler
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    trim_space: bool = False
    score_prompt: bool = False
    reuse: Reuse = "any"
    client: str = ""


Sink = Callable[[Step | Exception], None]
"""Gets every step, from the engine's thread; the last has a finish reason or is an exception."""


class Job:
    """A request under way.

    Attributes:
        request: what is asked for.
        text: prompt and answer so far.
        n_cached: tokens of the prompt that were taken over.
        n_gen: tokens generated.
        cancelled: set by the engine's ``cancel``.
        turn: jobs with the lowest one compute a part of their prompt first.
        scores: of the prompt's tokens, if they are wanted.
        speculation: guesses what comes next, for when nobody else is served.
    """

    def __init__(self, request: Request, sink: Sink, model: Model, room: int) -> None:
        self.request = request
        self.text: list[int] = request.prompt.tolist()
        self.n_cached = 0
        self.n_gen = 0
        self.cancelled = False
        self.turn = 0
        self.started = perf_counter()
        self.scores: PromptScores | None = None
        if request.score_prompt:
            self.scores = PromptScores(request.prompt, request.top_logprobs, model.tokenizer)
        self.speculation = Speculation(PromptLookup())
        self._sink = sink
        self._room = room
        self._first = 0.0
        decoder = IncrementalDecoder(model.tokenizer, trim_space=request.trim_space)
        eos_ids = frozenset(model.config.eos_token_ids)
        self._answer = AnswerText(decoder, eos_ids, request.stop, room)

    @property
    def client(self) -> str:
        """Whose request it is."""
        return self.request.client

    @property
    def n_left(self) -> int:
        """Tokens that may still be generated."""
        return self._room - self.n_gen

    def push(self, token_id: int, logprob: float, logits: Logits) -> Step:
        """Go on by a token, which was chosen by ``logits`` float32 [vocab]."""
        request = self.request
        top = top_logprobs(logits, request.top_logprobs) if request.top_logprobs else ()
        self.text.append(token_id)
        self.n_gen += 1
        now = perf_counter()
        if self.n_gen == 1:
            self._first = now
        timings = Timings(
            n_prompt=len(request.prompt),
            n_cached=self.n_cached,
            prompt_seconds=self._first - self.started,
            n_gen=self.n_gen,
            gen_seconds=now - self._first,
        )
        text, reason = self._answer.push(token_id)
        return Step(Token(text, token_id, logprob, reason, timings), tuple(top))

    def tell(self, event: Step | Exception) -> None:
        """Hand ``event`` to the client. A sink that fails has no client any more."""
        scores, self.scores = self.scores, None
        try:
            if scores is not None and isinstance(event, Step):
                for step in scores.steps:
                    self._sink(step)
            self._sink(event)
        except Exception:
            self.cancelled = True
