"""Guessing several tokens at once: the text is that of plain decoding, in fewer passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py.decoding import decode, prefill
from tmac_py.model import Model
from tmac_py.sampling import Sampler, SamplingParams
from tmac_py.speculative import (
    MOST_GUESSED,
    DraftLength,
    DraftModel,
    Guess,
    PromptLookup,
    Speculation,
    speculate,
)

PROMPT = np.random.default_rng(5).integers(0, tiny.VOCAB, 9).astype(np.int32)


class Oracle:
    """Knows the text, and says something else at some places."""

    seconds_per_token = None

    def __init__(self, text: Sequence[int], wrong: float) -> None:
        rng = np.random.default_rng(1)
        self._said = [(i + 1) % tiny.VOCAB if rng.random() < wrong else i for i in text]

    def guess(self, history: Sequence[int], most: int) -> Guess:
        return Guess(self._said[len(history) :][:most])


class Often(Speculation):
    """Tries guesses of changing length, whatever they cost."""

    def __init__(self, drafter: Oracle) -> None:
        super().__init__(drafter)
        self._lengths = itertools.cycle([3, 0, MOST_GUESSED, 1, 7])

    def guess(self, history: Sequence[int], most: int) -> list[int]:
        self._guess = self._drafter.guess(history, min(most, next(self._lengths)))
        return self._guess.tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.write_tiny_model(tmp_path_factory.mktemp("speculative") / "tiny.lut")
    with Model.load(path, threads=2) as model:
        yield model


def plain(model: Model, params: SamplingParams, n: int) -> tuple[list[int], list[float]]:
    cache = model.new_cache()
    history = PROMPT.tolist()
    logits = prefill(model.forward, cache, PROMPT)
    tokens = decode(model.forward, cache, logits, Sampler(params), history)
    return history, [logprob for _, logprob in itertools.islice(tokens, n)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_the_text_is_that_of_plain_decoding(model: Model, temperature: float, wrong: float) -> None:
    params = SamplingParams(temperature=temperature, repeat_penalty=1.1, seed=3)
    text, logprobs = plain(model, params, 80)
    cache = model.new_cache()
    calls = []

    def forward(ids, cache, logits="last"):
        calls.append(len(ids))
        return model.forward(ids, cache, logits)

    logits = prefill(forward, cache, PROMPT)
    history = PROMPT.tolist()
    speculation = Often(Oracle(text, wrong))
    tokens = list(speculate(forward, cache, logits, Sampler(params), history, speculation, 80))
    assert history == text
    assert [logprob for _, logprob in tokens] == logprobs
    assert cache.pos == len(PROMPT) + 79
    if wrong == 0:
        assert len(calls) < 25
        assert speculation.n_right == speculation.n_guessed > 60
    if wrong == 1:
        assert speculation.n_right == 0


def test_the_end_of_the_context_limits_guesses(model: Model) -> None:
    params = SamplingParams(temperature=0)
    text, _ = plain(model, params, 20)
    cache = model.new_cache(len(PROMPT) + 19)
    logits = prefill(model.forward, cache, PROMPT)
    history = PROMPT.tolist()
    speculation = Often(Oracle([*text, *[0] * 50], 0.0))
    list(speculate(model.forward, cache, logits, Sampler(params), history, speculation, 20))
    assert history == text
    assert cache.pos == cache.n_ctx


def test_a_closed_generation_leaves_what_was_said(model: Model) -> None:
    params = SamplingParams(temperature=0)
    text, _ = plain(model, params, 30)
    for n in range(1, 12):
        cache = model.new_cache()
        logits = prefill(model.forward, cache, PROMPT)
        history = PROMPT.tolist()
        speculation = Often(Oracle(text, 0.0))
        tokens = speculate(model.forward, cache, logits, Sampler(params), history, speculation, 30)
        for _ in range(n):
            next(tokens)
        tokens.close()
        assert history == text[: len(PROMPT) + n]
        assert cache.pos == len(PROMPT) + n - 1
        assert int(model.forward(history[-1:], cache).argmax()) == text[len(PROMPT) + n]


def test_a_draft_model_guesses_what_it_would_say(model: Model) -> None:
    text, _ = plain(model, SamplingParams(temperature=0), 40)
    drafter = DraftModel(model.forward, model.new_cache())
    for known in (len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 7):
        assert drafter.guess(text[:known], 6).tokens == text[known : known + 6]
    other = [*text[: len(PROMPT) + 8], (text[len(PROMPT) + 8] + 1) % tiny.VOCAB]
    expected = int(model.logits(other)[-1].argmax())
    assert drafter.guess(other, 1).tokens == [expected]
    assert drafter.seconds_per_token > 0
    small = DraftModel(model.forward, model.new_cache(len(PROMPT) + 3))
    assert small.guess(text[: len(PROMPT)], 15).tokens == text[len(PROMPT) : len(PROMPT) + 4]
    assert small.guess(text[: len(PROMPT) + 3], 15).tokens == text[len(PROMPT) + 3 :][:1]
    assert small.guess(text[: len(PROMPT) + 4], 15).tokens == []


def test_lookup_finds_the_longest_and_latest_run() -> None:
    lookup = PromptLookup(sizes=(3, 2))
    assert lookup.guess([1, 2, 3, 4], 5) == Guess([])
    text = [1, 2, 3, 4, 9, 2, 3, 7, 5, 1, 2, 3]
    assert lookup.guess(text, 2) == Guess([4, 9], 3)
    assert lookup.guess([*text, 8, 2, 3], 3) == Guess([8, 2, 3], 2)
    assert PromptLookup().guess([7, 8, 7, 8], 5) == Guess([7, 8, 7, 8, 7], 2)


def test_length_follows_gain_and_cost() -> None:
    length = DraftLength()
    assert length.best(0, 15) == 0  # nothing is known of the model yet
    for _ in range(50):
        length.timed(1, 0.010)
        length.judged(0, [True] * 5)
        length.judged(1, [False])
    assert length.best(0, 15) == 15
    assert length.best(0, 4) == 4
    assert length.best(1, 15) == 0
    assert length.best(0, 15, seconds_per_token=0.02) == 0
    for _ in range(50):
        length.timed(4, 0.030)  # passes of 4 turn out to cost as much as 3 tokens
    assert length.best(0, 3) != 3
    for _ in range(2000):
        length.timed(1, 0.010)  # ... long ago
    assert length.best(0, 3) == 3


def test_guesses_that_fail_are_given_up_and_come_back() -> None:
    """Lookups are judged even where they are not tried."""

    class Never:
        seconds_per_token = None

        def guess(self, _history: Sequence[int], most: int) -> Guess:
            return Guess([0] * most)

    speculation = Speculation(Never())
    speculation.length.timed(1, 0.01)
    tried = []
    for token in [1] * 40 + [0] * 40:
        guessed = speculation.guess([], 4)
        tried.append(len(guessed))
        speculation.judge(len(guessed), [token])
    assert tried[0] > 0
    assert tried[20:40] == [0] * 20
    assert tried[-1] > 0


def test_a_costly_drafter_is_asked_seldom_once_it_fails() -> None:
    class Slow:
        seconds_per_token = 0.004

        def __init__(self) -> None:
            self.asked = 0

        def guess(self, _history: Sequence[int], most: int) -> Guess:
            self.asked += 1
            return Guess([0] * most)

    drafter = Slow()
    speculation = Speculation(drafter)
    for _ in range(1000):
        speculation.length.timed(1, 0.01)
        speculation.judge(len(speculation.guess([], 8)), [1])
    assert 4 < drafter.asked < 20
