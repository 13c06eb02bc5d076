"""The sampler of the core against NumPy, written out: every step in float64, one after another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.errors import OptionError, TmacError
from tmac_py.sampling import Sampler, SamplingParams, top_logprobs

Logits = NDArray[np.float32]
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(rng: np.random.Generator, n: int) -> Logits:
    """Normal ones, some with ties, some with forbidden tokens."""
    logits = (rng.standard_normal(n) * rng.choice([0.1, 1.0, 4.0])).astype(np.float32)
    if rng.random() < 0.4:
        logits = np.round(logits * 2) / 2
    if rng.random() < 0.3:
        logits[rng.random(n) < 0.5] = -np.inf
        logits[rng.integers(n)] = 1.0
    return logits


def random_params(rng: np.random.Generator, n: int) -> SamplingParams:
    penalised = rng.random() < 0.5
    return SamplingParams(
        temperature=float(rng.choice([0.2, 0.8, 1.0, 3.0])),
        top_k=int(rng.choice([0, 1, 5, 40, n // 2, n, 2 * n])),
        top_p=float(rng.choice([1.0, 0.95, 0.5, 1e-6])),
        min_p=float(rng.choice([0.0, 0.05, 0.5, 1.0])),
        repeat_penalty=float(rng.choice([1.0, 1.3, 0.7])) if penalised else 1.0,
        presence_penalty=float(rng.choice([0.0, 0.5])) if penalised else 0.0,
        frequency_penalty=float(rng.choice([0.0, 0.25, -0.5])) if penalised else 0.0,
        repeat_last_n=int(rng.choice([-1, 0, 7, 64])),
        logit_bias={int(i): 2.0 for i in rng.integers(n, size=3)} if rng.random() < 0.3 else {},
        seed=int(rng.integers(1 << 32)),
    )


def adjusted(logits: Logits, history: list[int], params: SamplingParams) -> Logits:
    """Bias and penalties, in float32 as the logits are."""
    scores = logits.copy()
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    window = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
    if params.repeat_last_n == 0:
        window = []
    for token in set(window):
        factor = np.float32(params.repeat_penalty)
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        taken = window.count(token) * params.frequency_penalty + params.presence_penalty
        scores[token] -= np.float32(taken)
    return scores


def obvious(
    logits: Logits, history: list[int], params: SamplingParams
) -> tuple[list[int], list[float]]:
    """Ids that may come next, and the probability of each."""
    scores = adjusted(logits, history, params).astype(np.float64)
    order = sorted(np.flatnonzero(scores > -np.inf).tolist(), key=lambda i: (-scores[i], i))
    order = order[: params.top_k or None]
    p = np.exp(scores[order] - scores[order[0]])
    p /= p.sum()
    if params.top_p < 1:
        # A share that is the wanted one but for rounding is enough.
        order = order[: int(np.searchsorted(np.cumsum(p), params.top_p - 1e-9)) + 1]
    order = [i for i, q in zip(order, p, strict=False) if q >= params.min_p * p[0] * (1 - 1e-6)]
    if params.top_p == 1:
        order.sort()
    weights = np.exp((scores[order] - scores.max()) / params.temperature)
    return order, (weights / weights.sum()).tolist()


def test_the_distribution_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(5)
    for n in (1, 2, 31, 32, 33, 500, 2047, 2048, 2049, 5000):
        for _ in range(60):
            logits, params = random_logits(rng, n), random_params(rng, n)
            history = rng.integers(n, size=rng.integers(100)).tolist()
            ids, shares = Sampler(params).probabilities(logits, history)
            assert (ids.dtype, shares.dtype) == (np.int32, np.float64)
            wanted, wanted_shares = obvious(logits, history, params)
            assert ids.tolist() == wanted, (n, params)
            np.testing.assert_allclose(shares, wanted_shares, rtol=1e-9, atol=1e-300)
            assert abs(shares.sum() - 1) < 1e-9


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_top_p_of_a_large_vocabulary(scale: float, top_p: float) -> None:
    logits = (np.random.default_rng(1).standard_normal(50_000) * scale).astype(np.float32)
    params = SamplingParams(**{**OFF, "top_p": top_p})
    ids, _ = Sampler(params).probabilities(logits)
    order = np.argsort(-logits, kind="stable")
    p = np.exp(logits[order].astype(np.float64) - float(logits.max()))
    cumulative = np.cumsum(p / p.sum())
    # The sum over the vocabulary is rounded to float32: a token more or less at the edge.
    low, high = np.searchsorted(cumulative, [top_p * (1 - 1e-6), top_p * (1 + 1e-6)]) + 1
    assert low <= len(ids) <= high
    assert ids.tolist() == order[: len(ids)].tolist()


def test_the_random_numbers_are_those_of_numpy() -> None:
    for seed in (0, 1, 2**32 - 1, 2**80 + 12345):
        ours = Sampler(SamplingParams(seed=seed))
        theirs = np.random.Generator(np.random.PCG64(seed))
        assert [ours.random() for _ in range(100)] == theirs.random(100).tolist()


def test_a_token_is_drawn_by_the_cumulative_shares() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        n = int(rng.choice([3, 70, 3000]))
        logits, params = random_logits(rng, n), random_params(rng, n)
        history = rng.integers(n, size=20).tolist()
        ids, shares = Sampler(params).probabilities(logits, history)
        target = np.random.Generator(np.random.PCG64(params.seed)).random()
        at = int(np.searchsorted(np.cumsum(shares), target, side="right"))
        assert Sampler(params).sample(logits, history)[0] == ids[at]
        assert Sampler(params).sample_from(ids, shares) == ids[at]


# chi-square: the quantile of 1 - 1e-6 by Wilson and Hilferty (1931)
def chi_square_limit(degrees: int) -> float:
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.753 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, **OFF},
        {"temperature": 1.3, "top_k": 0, "min_p": 0.0},
        {"top_k": 7, "repeat_penalty": 1.4, "logit_bias": {3: 1.5, 4: -math.inf}},
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_frequencies_are_those_of_the_distribution(options: dict[str, Any], seed: int) -> None:
    logits = (np.random.default_rng(8).standard_normal(60) * 1.5).astype(np.float32)
    history = np.argsort(-logits)[:3].tolist()
    sampler = Sampler(SamplingParams(seed=seed, **options))
    ids, shares = sampler.probabilities(logits, history)
    assert len(ids) > 2
    draws = 40_000
    for draw in (
        lambda: sampler.sample(logits, history)[0],
        lambda: sampler.sample_from(ids, 7 * shares),
    ):
        counts = np.bincount([draw() for _ in range(draws)], minlength=60)
        assert counts.sum() == counts[ids].sum()
        expected = shares * draws
        rare = expected < 5  # the statistic wants at least so many: put together
        found = np.append(counts[ids][~rare], counts[ids][rare].sum())
        wanted = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
        statistic = float(((found - wanted) ** 2 / wanted).sum())
        assert statistic < chi_square_limit(len(found) - 1)


def test_accepting_a_draft_by_the_distribution_keeps_it() -> None:
    """The rule of speculative sampling (Leviathan et al., 2023): accept, else draw the rest."""
    rng = np.random.default_rng(3)
    logits, draft = (rng.standard_normal((2, 12)) * 1.5).astype(np.float32)
    target = Sampler(SamplingParams(temperature=1.0, seed=5, **OFF))
    drafter = Sampler(SamplingParams(temperature=1.0, seed=6, **OFF))
    ids, p = target.probabilities(logits)
    _, q = drafter.probabilities(draft)
    counts = np.zeros(12)
    for _ in range(30_000):
        token = drafter.sample(draft)[0]
        if target.random() * q[token] >= p[token]:
            token = target.sample_from(ids, np.maximum(p - q, 0))
        counts[token] += 1
    statistic = float(((counts - p * 30_000) ** 2 / (p * 30_000)).sum())
    assert statistic < chi_square_limit(11)


@pytest.mark.parametrize("isa", [row["name"] for row in _core.isas() if row["usable"]])
def test_every_instruction_set_gives_the_same(isa: str) -> None:
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal(20_000) * 3).astype(np.float32)
    before = _core.active_isa()

    def run() -> list[Any]:
        results: list[Any] = []
        for options in ({}, OFF, {"top_k": 0, "min_p": 0.0}, {"temperature": 0}):
            sampler = Sampler(SamplingParams(seed=9, **options))
            results += [sampler.sample(logits) for _ in range(5)]
            results.append([array.tobytes() for array in sampler.probabilities(logits)])
        return results

    wanted = run()
    _core.use_isa(isa)
    try:
        assert run() == wanted
    finally:
        _core.use_isa(before)


def test_the_most_likely_tokens() -> None:
    rng = np.random.default_rng(6)
    for n in (1, 5, 3000, 40_000):
        logits = random_logits(rng, n)
        wide = logits.astype(np.float64)
        logprobs = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
        order = [i for i in np.argsort(-logits, kind="stable") if logits[i] > -np.inf]
        for k in (1, 3, 20, 5000):
            found = top_logprobs(logits, k)
            assert [token for token, _ in found] == order[:k]
            np.testing.assert_allclose([p for _, p in found], logprobs[order[:k]], atol=1e-6)
    with pytest.raises(OptionError, match="n is 0"):
        top_logprobs(logits, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bias(temperature: float) -> None:
    logits = np.array([5.0, 1.0, 0.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, logit_bias={2: 50}, seed=1))
    token, logprob = sampler.sample(logits)
    assert token == 2
    assert logprob == pytest.approx(-math.log(1 + math.exp(1) + math.exp(5)))
    forbid = SamplingParams(temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})
    assert Sampler(forbid).sample(logits)[0] == 2
    with pytest.raises(TmacError, match="no token is allowed"):
        Sampler(forbid).sample(np.array([5.0, 1.0, -np.inf], np.float32))
    with pytest.raises(TmacError, match="logit_bias: token 3 is outside the vocabulary of 3"):
        Sampler(SamplingParams(logit_bias={3: 1.0})).sample(logits)


@pytest.mark.parametrize(
    ("bias", "match"),
    [
        ({"1": 2.0}, "a token id of logit_bias is '1'"),
        ({-1: 2.0}, "a token id of logit_bias is -1"),
        ({2**31: 2.0}, "a token id of logit_bias"),
        ({1: math.inf}, "logit_bias of token 1 is inf"),
        ({1: math.nan}, "logit_bias of token 1 is nan"),
        ({1: 1e39}, "logit_bias of token 1"),
        ([1], "logit_bias is"),
    ],
)
def test_a_bias_that_is_not_allowed_is_named(bias: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        SamplingParams(logit_bias=bias)


def test_processors_come_first_and_the_log_probability_is_the_models() -> None:
    logits = np.array([5.0, 1.0, 0.0, 0.0], np.float32)
    before = logits.copy()
    seen = []

    def forbid_first(ids: NDArray[np.int32], scores: Logits) -> None:
        seen.append((ids.dtype, ids.tolist()))
        scores[0] = -np.inf

    def reverse(_: NDArray[np.int32], scores: Logits) -> Logits:
        return scores[::-1]

    greedy = SamplingParams(temperature=0)
    assert Sampler(greedy, [forbid_first]).sample(logits, [7, 8])[0] == 1
    assert seen == [(np.int32, [7, 8])]
    token, logprob = Sampler(greedy, [forbid_first, reverse]).sample(logits)
    assert token == 2
    assert logprob == pytest.approx(-math.log(2 + math.exp(1) + math.exp(5)))
    assert np.array_equal(logits, before)
    for bad in (np.zeros(3, np.float32), np.zeros(4, np.int64), "no"):
        with pytest.raises(OptionError, match="logits_processor returned"):
            Sampler(greedy, [lambda *_, bad=bad: bad]).sample(logits)  # type: ignore[misc]


@pytest.mark.parametrize("at", [0, 40, 2047, 4999])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_token_that_is_not_finite_is_named(at: int, bad: float) -> None:
    logits = np.zeros(5000, np.float32)
    logits[at] = bad
    sampler = Sampler(SamplingParams())
    for refuse in (sampler.sample, sampler.probabilities, lambda x: top_logprobs(x, 3)):
        with pytest.raises(TmacError, match=f"no usable logits: token {at} has {bad}"):
            refuse(logits)


@pytest.mark.parametrize("shares", [[], [0.0], [1.0, -0.5], [np.nan, 1.0], [np.inf]])
def test_shares_that_cannot_be_drawn_from(shares: list[float]) -> None:
    with pytest.raises(TmacError, match="shares to draw from"):
        Sampler(SamplingParams()).sample_from(
            np.zeros(len(shares), np.int32), np.array(shares, np.float64)
        )


def test_penalties_beyond_float32_are_an_error() -> None:
    params = SamplingParams(presence_penalty=-1e300)
    with pytest.raises(TmacError, match="out of the range of float32"):
        Sampler(params).sample(np.zeros(3, np.float32), [1])


def test_a_history_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(TmacError, match="history: token 3 is outside"):
        Sampler(SamplingParams(presence_penalty=1)).sample(np.zeros(3, np.float32), [3])
