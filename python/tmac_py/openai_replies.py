"""Answers in OpenAI's shape, which llama-cpp-python has too: plain dicts, whole or in chunks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tmac_py.generate import Step, Timings
from tmac_py.tokenizer import Tokenizer
from tmac_py.tool_calls import ToolCall, ToolCallFinder

LEAST_LOGPROB = -9999.0
"""Not every token is possible: JSON has no -Infinity, and OpenAI writes this for it."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class ReplyShape:
    """What answers show.

    Attributes:
        chat: whether they are messages.
        logprobs: with log probabilities.
        top_logprobs: those of so many alternatives for each token.
        include_usage: of answers in chunks: the counts at the end.
        n: answers to each prompt; those to the first prompt come first.
        echo: the prompts, where answers begin with them.
        tools: names of functions; calls of them are shown as such.
    """

    chat: bool
    logprobs: bool = False
    top_logprobs: int = 0
    include_usage: bool = False
    n: int = 1
    echo: tuple[str, ...] = ()
    tools: frozenset[str] = frozenset()


class Reply:
    """The answers to one request, whole or in chunks.

    Args:
        asked: what they show.
        tokenizer: makes the texts of tokens.
        model: its name.
        n_prompts: there are ``asked.n`` answers to each of so many prompts.
    """

    def __init__(
        self, asked: ReplyShape, tokenizer: Tokenizer, model: str, n_prompts: int = 1
    ) -> None:
        self._asked = asked
        self._model = model
        self._created = int(time.time())
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._id = f"{prefix}-{os.urandom(12).hex()}"
        self._choices = [_Choice(i, asked, tokenizer) for i in range(n_prompts * asked.n)]
        self._frames: list[tuple[bytes, bytes] | None] = [None] * len(self._choices)
        self._ended: dict[int, Timings] = {}

    def whole(self, *answers: Sequence[Step], n_discarded: int = 0) -> dict[str, Any]:
        """All answers whole, in order; ``n_discarded`` tokens of others count as well."""
        kind = "chat.completion" if self._asked.chat else "text_completion"
        choices = [
            choice.whole(steps) for choice, steps in zip(self._choices, answers, strict=True)
        ]
        ended = [steps[-1].token.timings for steps in answers]
        return {
            **self._frame(kind, choices),
            "usage": usage(*ended, n=self._asked.n, n_discarded=n_discarded),
        }

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        return [self._chunk([part]) for choice in self._choices for part in choice.opening()]

    def chunks(self, step: Step, index: int = 0) -> list[dict[str, Any]]:
        """What one token adds to an answer: nothing while a character is incomplete."""
        chunks = [self._chunk([part]) for part in self._choices[index].parts(step)]
        if step.token.finish_reason is not None:
            self._ended[index] = step.token.timings
            if self._asked.include_usage and len(self._ended) == len(self._choices):
                ended = [self._ended[i] for i in range(len(self._choices))]
                chunks.append({**self._chunk([]), "usage": usage(*ended, n=self._asked.n)})
        return chunks

    def events(self, step: Step, index: int = 0) -> bytes:
        """What :meth:`chunks` gives as server-sent events.

        Most chunks differ in nothing but the text: the rest of them is made once for each answer.
        """
        asked, token = self._asked, step.token
        if asked.logprobs or asked.tools or token.finish_reason is not None:
            return b"".join(map(event, self.chunks(step, index)))
        if not token.text:
            return b""
        before, after = self._frames[index] or self._make_frame(index)
        return before + to_json(token.text) + after

    def _make_frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in an event of that answer."""
        mark = os.urandom(16).hex()
        choice = self._choices[index].plain(mark)
        before, _, after = event(self._chunk([choice])).partition(to_json(mark))
        self._frames[index] = before, after
        return before, after

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._frame(
            "chat.completion.chunk" if self._asked.chat else "text_completion", choices
        )
        return {**chunk, "usage": None} if self._asked.include_usage else chunk

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


class _Choice:
    """One of the answers."""

    def __init__(self, index: int, asked: ReplyShape, tokenizer: Tokenizer) -> None:
        self._index = index
        self._asked = asked
        self._tokenizer = tokenizer
        self._echo = asked.echo[index // asked.n] if asked.echo else ""
        self._finder = ToolCallFinder(asked.tools) if asked.tools else None
        self._offset = 0
        self._n_calls = 0

    def whole(self, steps: Sequence[Step]) -> dict[str, Any]:
        """All of it."""
        text = "".join(step.token.text for step in steps if step.token.n_gen > 0)
        reason = steps[-1].token.finish_reason
        if not self._asked.chat:
            return self._choice({"text": self._echo + text}, steps, reason)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._finder is not None:
            parts = self._finder.push(text) + self._finder.flush()
            calls = [self._call(part) for part in parts if isinstance(part, ToolCall)]
            if calls:
                message["content"] = "".join(p for p in parts if isinstance(p, str)) or None
                message["tool_calls"] = calls
        return self._choice({"message": message}, steps, self._reason(reason))

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        if self._asked.chat:
            return [self._choice({"delta": {"role": "assistant", "content": ""}}, (), None)]
        # With log probabilities the tokens of the prompt come as steps.
        if self._echo and not self._asked.logprobs:
            return [self._choice({"text": self._echo}, (), None)]
        return []

    def parts(self, step: Step) -> list[dict[str, Any]]:
        """What one token adds, and the end after the last one."""
        token, steps = step.token, (step,)
        ended = token.finish_reason is not None
        contents: list[dict[str, Any]]
        if self._finder is None:
            contents = [self._content(token.text)] if token.text else []
        else:
            found = self._finder.push(token.text) + (self._finder.flush() if ended else [])
            contents = [{"delta": self._delta(part)} for part in found]
        if self._asked.logprobs and not contents:
            contents = [self._content("")]
        choices = [
            self._choice(content, () if i else steps, None) for i, content in enumerate(contents)
        ]
        if ended:
            end: dict[str, Any] = {"delta": {}} if self._asked.chat else {"text": ""}
            choices.append(self._choice(end, (), self._reason(token.finish_reason)))
        return choices

    def plain(self, text: str) -> dict[str, Any]:
        """What a token adds that is nothing but text, before the end of the answer."""
        return self._choice(self._content(text), (), None)

    def _content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._asked.chat else {"text": text}

    def _delta(self, part: str | ToolCall) -> dict[str, Any]:
        if isinstance(part, str):
            return {"content": part}
        index = self._n_calls
        return {"tool_calls": [{"index": index, **self._call(part)}]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._n_calls += 1
        return {
            "id": f"call_{os.urandom(12).hex()}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._n_calls else reason

    def _choice(
        self, content: dict[str, Any], steps: Sequence[Step], reason: str | None
    ) -> dict[str, Any]:
        with_logprobs = self._asked.logprobs and steps
        logprobs = self._logprobs(steps) if with_logprobs else None
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        if self._asked.chat:
            return {
                "content": [
                    {
                        **self._entry(step.token.id, step.token.logprob),
                        "top_logprobs": [self._entry(*pair) for pair in step.top],
                    }
                    for step in steps
                ],
                "refusal": None,
            }
        offsets = []
        for step in steps:
            offsets.append(self._offset)
            self._offset += len(step.token.text)
        return {
            "tokens": [self._text(step.token.id) for step in steps],
            "token_logprobs": [_finite(step.token.logprob) for step in steps],
            "top_logprobs": [self._top(step) for step in steps]
            if self._asked.top_logprobs
            else None,
            "text_offset": offsets,
        }

    def _top(self, step: Step) -> dict[str, float] | None:
        """Alternatives; None for a token with nothing before it."""
        if math.isnan(step.token.logprob):
            return None
        return {self._text(token_id): max(value, LEAST_LOGPROB) for token_id, value in step.top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return self._tokenizer.piece(token_id) or ""
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def _finite(logprob: float) -> float | None:
    """As JSON has it; None for a token with nothing before it."""
    return None if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)


def usage(*answers: Timings, n: int = 1, n_discarded: int = 0) -> dict[str, Any]:
    """Counts of tokens of ``n`` answers to each prompt, ``n_discarded`` ones of others included."""
    first = answers[::n]
    n_prompt = sum(timings.n_prompt for timings in first)
    n_gen = sum(timings.n_gen for timings in answers) + n_discarded
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_gen,
        "total_tokens": n_prompt + n_gen,
        "prompt_tokens_details": {"cached_tokens": sum(timings.n_cached for timings in first)},
    }


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def to_json(data: object) -> bytes:
    """JSON in ASCII, without blanks."""
    return _ENCODER.encode(data).encode()
