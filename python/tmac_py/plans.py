"""From what a caller says to what a generation needs: checked, with the model's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from tmac_py.cancelling import Cancel, check_cancel
from tmac_py.checks import check_whole
from tmac_py.constraints import read_form
from tmac_py.decoding import Ids, Progress
from tmac_py.errors import ContextError, OptionError
from tmac_py.generate import check_stop
from tmac_py.options import SAMPLING_OPTIONS, AnswerOptions, given_options
from tmac_py.sampling import LogitsProcessor, Sampler, SamplingParams, check_processors, new_seed
from tmac_py.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from tmac_py.model import Model

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One generation to come; good for one.

    Attributes:
        prompt: ids int32 [n], n >= 1.
        room: the most tokens to generate, at least 1.
        params: how to choose them.
        processors: change the logits before.
        eos_ids: tokens that end the answer.
        stop: strings that do.
        decoder: turns them into text.
        draft, cancel, progress: see GenerationOptions.
    """

    prompt: Ids
    room: int
    params: SamplingParams
    processors: tuple[LogitsProcessor, ...]
    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    decoder: IncrementalDecoder
    draft: str | Model
    cancel: Cancel | None
    progress: Progress | None

    def sampler(self) -> Sampler:
        """Chooses the tokens."""
        return Sampler(self.params, self.processors)


def make_plan(
    model: Model, prompt: str | ArrayLike, n_ctx: int, options: Mapping[str, Any]
) -> Plan:
    """Check the options of a generation after ``prompt`` in a context of ``n_ctx`` tokens.

    Raises:
        ContextError: the prompt leaves no room for an answer.
        OptionError: an option is not allowed.
        TypeError: there is no such option.
    """
    given = given_options(options)
    ids = model.check_prompt(prompt)
    room = _room(len(ids), given.get("max_tokens", DEFAULT_MAX_TOKENS), n_ctx)
    sampling = {name: given[name] for name in SAMPLING_OPTIONS if name in given}
    params = SamplingParams(**{**model.sampling_defaults, **sampling})
    _check_tokens(model, "a token id of logit_bias", params.logit_bias)
    stop_ids = _check_tokens(model, "a token id of stop_token_ids", given.get("stop_token_ids", ()))
    processors = check_processors(given.get("logits_processor", ()))
    cancel = given.get("cancel")
    check_cancel(cancel)
    progress = given.get("progress")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress is {progress!r}; allowed: a function")
    stop = check_stop(given.get("stop", ()))
    form = read_form(given)
    if form is not None:  # last: other processors cannot bring back what it forbids
        processors = (*processors, model.constraints.processor(form, len(ids)))
    return Plan(
        prompt=ids,
        room=room,
        params=params,
        processors=processors,
        eos_ids=frozenset(model.config.eos_token_ids) | stop_ids,
        stop=stop,
        decoder=IncrementalDecoder(model.tokenizer, trim_space=given.get("trim_space", False)),
        draft=given.get("draft", "lookup"),
        cancel=cancel,
        progress=progress,
    )


def needed_context(model: Model, n_prompt: int, max_tokens: int | None) -> int:
    """Tokens that a prompt and its answer need at most, within what the model allows."""
    wanted = _check_max_tokens(DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)
    return model.n_ctx if wanted == -1 else min(model.n_ctx, n_prompt + wanted)


def fix_seed(options: AnswerOptions) -> int:
    """The seed of ``options``, drawn and put there if there is none."""
    seed = options.get("seed")
    if seed is None:
        seed = options["seed"] = new_seed()
    return seed


def _check_max_tokens(max_tokens: int) -> int:
    if max_tokens == -1:
        return -1
    return check_whole("max_tokens", max_tokens, 1, note=", or -1 (until the context is full)")


def _room(n_prompt: int, max_tokens: int, n_ctx: int) -> int:
    """Tokens that may be generated: ``max_tokens`` as far as the context allows."""
    _check_max_tokens(max_tokens)
    room = n_ctx - n_prompt
    if room < 1:
        raise ContextError(
            f"the prompt has {n_prompt} tokens, the context holds {n_ctx} "
            "and must leave room for at least one more"
        )
    return room if max_tokens == -1 else min(room, max_tokens)


def _check_tokens(model: Model, name: str, tokens: Any) -> frozenset[int]:
    """OptionError for one outside the vocabulary."""
    try:
        ids = list(tokens)
    except TypeError:
        raise OptionError(f"{name}: {tokens!r}; allowed: a sequence of token ids") from None
    high = model.config.vocab_size - 1
    return frozenset(check_whole(name, token, 0, high) for token in ids)
