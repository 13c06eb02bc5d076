"""Several prompts at once, and scores: the numbers that each gets alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py import ContextError, Model, OptionError
from tmac_py.evaluation import log_softmax

PROMPTS = [f"the cat {'sat on the mat ' * (i % 4)}{i}" for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("batch") / "tiny.lut"
    tiny.write_tiny_model(path, special=("embed",), quantize=tiny.flat_head)
    with Model.load(path, threads=2) as model:
        yield model


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.2, "seed": 7, "stop_token_ids": range(40, 90)},
        {"temperature": 0, "repeat_penalty": 1.3, "stop": ["a", "e"]},
        {"regex": "[a-d]{2,9}", "seed": 1, "stop_token_ids": [70]},
    ],
)
def test_a_batch_is_what_each_prompt_gets_alone(
    model: Model, options: dict, batch_size: int
) -> None:
    answers = model.generate_batch(PROMPTS, batch_size=batch_size, max_tokens=15, **options)
    assert len({len(answer.ids) for answer in answers}) > 1  # they end at different times
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        alone = model.generate(prompt, max_tokens=15, draft="none", **options)
        assert (answer, answer.ids, answer.logprobs) == (alone, alone.ids, alone.logprobs)
        assert answer.finish_reason == alone.finish_reason
        assert answer.timings.n_prompt == alone.timings.n_prompt


def test_one_pass_decodes_a_token_of_each(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    whole = model.forward_batch

    def counted(ids: list, caches: list, *rest: object) -> list:
        passes.append([len(own) for own in ids])
        return whole(ids, caches, *rest)

    monkeypatch.setattr(model, "forward_batch", counted)
    model.generate_batch([[5, 6], [7], [8, 9, 9]], max_tokens=4, logit_bias={2: -np.inf})
    assert sorted(passes[:3]) == [[1], [2], [3]]
    assert passes[3:] == [[1, 1, 1]] * 3


def test_seeds_of_a_batch_give_the_answers_again(model: Model) -> None:
    answers = model.generate_batch(["the cat"] * 3, temperature=2.0, max_tokens=20)
    assert len({answer.seed for answer in answers}) == 3
    for answer in answers:
        again = model.generate("the cat", temperature=2.0, max_tokens=20, seed=answer.seed)
        assert again.ids == answer.ids


def test_a_cancelled_batch_gives_what_came(model: Model) -> None:
    cancel = threading.Event()
    calls = []

    def processor(_ids: np.ndarray, _logits: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 8:  # two first tokens, then three of each
            cancel.set()

    answers = model.generate_batch(
        ["the", "cat", "sat"],
        batch_size=2,
        cancel=cancel,
        logits_processor=processor,
        logit_bias={2: -np.inf},
    )
    assert [len(answer.ids) for answer in answers] == [4, 4, 0]
    assert {answer.finish_reason for answer in answers} == {"cancelled"}


def test_a_batch_is_checked_before_any_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError

    assert model.generate_batch([]) == []
    monkeypatch.setattr(model, "forward_batch", no_work)
    long = [5] * tiny.N_CTX
    for prompts, options, error, text in (
        (["a", long], {}, ContextError, "the prompt has 96 tokens"),
        (["a", []], {}, OptionError, "the prompt has no tokens"),
        (["a"], {"batch_size": 17}, OptionError, "batch_size is 17; allowed: 1 to 16"),
        (["a"], {"temperature": -1}, OptionError, "temperature is -1"),
        (["a"], {"draught": 1}, TypeError, "unexpected keyword argument 'draught'"),
        (["a"], {"draft": "none"}, TypeError, "unexpected keyword argument 'draft'"),
        (["a"], {"n_ctx": -5}, ContextError, "n_ctx is -5; allowed: 0 up"),
        ("abc", {}, OptionError, "prompts is 'abc'; allowed: a list of prompts"),
    ):
        with pytest.raises(error, match=text):
            model.generate_batch(prompts, **options)


def test_scores_are_log_probabilities_of_the_tokens(model: Model) -> None:
    ids = model.tokenizer.encode("the cat sat on the mat")
    rows = log_softmax(model.logits(ids))
    expected = rows[np.arange(len(ids) - 1), ids[1:]]
    score = model.score("the cat sat on the mat")
    assert score.ids == tuple(ids[1:])
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-12)
    assert score.total == pytest.approx(expected.sum())
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()))
    np.testing.assert_array_equal(model.score(ids).logprobs, score.logprobs)


def test_a_text_after_another_is_scored_alone(model: Model) -> None:
    before = model.tokenizer.encode("the cat")
    own = model.tokenizer.encode(" sat", add_special=False)
    score = model.score(" sat", after="the cat")
    assert score.ids == tuple(own)
    whole = model.score([*before, *own])
    np.testing.assert_array_equal(score.logprobs, whole.logprobs[-len(own) :])


def test_what_cannot_be_scored(model: Model) -> None:
    with pytest.raises(OptionError, match="no token to score"):
        model.score([5])
    with pytest.raises(OptionError, match="no token to score"):
        model.score("", after="the cat")
    with pytest.raises(OptionError, match="outside the vocabulary"):
        model.score([5, tiny.VOCAB])
    with pytest.raises(OptionError, match="token ids must be a sequence"):
        model.score(5, after="the cat")
    with pytest.raises(ContextError, match="97 tokens, the context holds 96"):
        model.score([5] * 97)
