"""What a caller may say of one generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from tmac_py.cancelling import Cancel
    from tmac_py.model import Model
    from tmac_py.sampling import LogitsProcessor


class AnswerOptions(TypedDict, total=False):
    """What decides over an answer. None is the same as leaving one out.

    Attributes:
        max_tokens: the most tokens to generate (256); -1 = until the answer ends or the context is
            full.
        temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, presence_penalty,
            frequency_penalty, logit_bias, seed: see :class:`tmac_py.sampling.SamplingParams`; left
            out: as the model's makers want it (``Model.sampling_defaults``), else as there.
        logits_processor: one or several functions that are called before every token with the ids
            of prompt and answer so far, int32 [n], and the logits, float32 [vocab], which they
            change in place or replace by those they return.
        json_schema: the answer is JSON of this schema: an object, or JSON text of one. One of this
            and the next two; all need llguidance (``pip install 'tmac_py[grammar]'``).
        regex: the whole answer matches it, in the syntax of Rust's regex.
        grammar: the answer follows this Lark grammar, as llguidance reads it.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: further tokens that end the answer, as the model's own end tokens do; they
            are the last of its ids and not part of its text.
        trim_space: drop the space with which SentencePiece vocabularies begin an answer.
        cancel: ends the generation before the next pass over the weights once it is set, also
            between the parts of a long prompt: a ``threading.Event``, or what has ``is_set``. A
            stream then ends without a token that has a finish reason; a Result has "cancelled".
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    trim_space: bool | None
    cancel: Cancel | None


class GenerationOptions(AnswerOptions, total=False):
    """Keyword arguments of ``generate``, ``stream`` and ``chat``: :class:`AnswerOptions` and these.

    Attributes:
        draft: where guesses of the next tokens come from, which are verified several at a time:
            "lookup" (what followed the same words before, the default), a smaller model with the
            same vocabulary, or "none". The text is the same with all of them.
        progress: called with (tokens done, all tokens) after each part of the prompt.
    """

    draft: str | Model | None
    progress: Callable[[int, int], None] | None


SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
)
"""Those that are arguments of SamplingParams."""


def given_options(
    options: Mapping[str, Any], known: type[AnswerOptions] = GenerationOptions
) -> dict[str, Any]:
    """What the caller said: without what is None. TypeError for one that is not ``known``."""
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
    return {name: value for name, value in options.items() if value is not None}
