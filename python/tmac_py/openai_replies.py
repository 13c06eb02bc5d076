"""Answers in OpenAI's shape, which llama-cpp-python has too: plain dicts, whole or in chunks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tmac_py.generate import Step, Timings
from tmac_py.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ReplyShape:
    """What an answer shows.

    Attributes:
        chat: whether it is a message.
        logprobs: with log probabilities.
        top_logprobs: those of so many alternatives for each token.
        include_usage: of an answer in chunks: the counts at the end.
    """

    chat: bool
    logprobs: bool = False
    top_logprobs: int = 0
    include_usage: bool = False


class Reply:
    """The answer to one request, whole or in chunks."""

    def __init__(self, asked: ReplyShape, tokenizer: Tokenizer, model: str) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._model = model
        self._created = int(time.time())
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._id = f"{prefix}-{os.urandom(12).hex()}"
        self._offset = 0

    def whole(self, steps: Sequence[Step]) -> dict[str, Any]:
        """The whole answer."""
        text = "".join(step.token.text for step in steps)
        reason = steps[-1].token.finish_reason
        if self._asked.chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        else:
            choice = {"text": text}
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {
            **self._frame(kind, [self._choice(choice, steps, reason)]),
            "usage": usage(steps[-1].token.timings),
        }

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        if not self._asked.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(delta, (), None)])]

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        """What one token adds: nothing while a character is incomplete."""
        token = step.token
        chunks = []
        if token.text or self._asked.logprobs:
            text = {"delta": {"content": token.text}} if self._asked.chat else {"text": token.text}
            chunks.append(self._chunk([self._choice(text, [step], None)]))
        if token.finish_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self._asked.chat else {"text": ""}
            chunks.append(self._chunk([self._choice(end, (), token.finish_reason)]))
            if self._asked.include_usage:
                chunks.append({**self._chunk([]), "usage": usage(token.timings)})
        return chunks

    def _choice(
        self, content: dict[str, Any], steps: Sequence[Step], reason: str | None
    ) -> dict[str, Any]:
        with_logprobs = self._asked.logprobs and steps
        logprobs = self._logprobs(steps) if with_logprobs else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}

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
            "token_logprobs": [step.token.logprob for step in steps],
            "top_logprobs": [{self._text(i): value for i, value in step.top} for step in steps]
            if self._asked.top_logprobs
            else None,
            "text_offset": offsets,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        # Not every token is possible: JSON has no -Infinity, and OpenAI writes -9999 for it.
        return {
            "token": self._text(token_id),
            "logprob": max(logprob, -9999.0),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return self._tokenizer.piece(token_id) or ""
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def usage(timings: Timings) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": timings.n_prompt,
        "completion_tokens": timings.n_gen,
        "total_tokens": timings.n_prompt + timings.n_gen,
        "prompt_tokens_details": {"cached_tokens": timings.n_cached},
    }


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
