"""The sampler against an obvious one, its frequencies, and what it refuses."""

import math

import numpy as np
import pytest

from tmac_py.errors import TmacError
from tmac_py.sampling import Sampler, SamplingParams

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(n, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def obvious_candidates(logits, *, top_k, top_p, min_p):
    """llama.cpp's samplers one after another, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    p = np.exp(logits[order].astype(np.float64) - float(logits.max()))
    p /= p.sum()
    if top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    return {i for i, q in zip(order, p, strict=False) if q >= min_p * p[0]}


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 999])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_candidates_are_those_of_the_definition(n, top_k, top_p, min_p):
    logits = random_logits(n, seed=n)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    ids, _ = Sampler(params).probabilities(logits)
    wanted = obvious_candidates(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(ids.tolist()) == wanted
    assert len(ids) == len(wanted)


@pytest.mark.parametrize("k", [1, 3, 64, 900, 1300])
def test_equal_scores_count_from_the_lowest_id(k):
    scores = np.repeat(np.array([1.0, 5.0, 5.0, 2.0], np.float32), 325)
    wanted = sorted(np.argsort(-scores, kind="stable")[:k].tolist())
    ids, _ = Sampler(SamplingParams(**{**OFF, "top_k": k})).probabilities(scores)
    assert ids.tolist() == wanted


def test_frequencies_follow_the_softmax_at_the_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    for temperature in (0.5, 1.0, 2.0):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=1, **OFF))
        drawn = [sampler.sample(logits)[0] for _ in range(20000)]
        wanted = np.exp(logits.astype(np.float64) / temperature)
        wanted /= wanted.sum()
        # five standard deviations of the largest binomial share
        assert np.abs(np.bincount(drawn) / len(drawn) - wanted).max() < 5 * 0.5 / math.sqrt(20000)


def test_greedy_takes_the_first_of_the_largest():
    logits = random_logits(5000)
    logits[[17, 4000]] = logits.max() + 1
    greedy = Sampler(SamplingParams(temperature=0))
    assert greedy.sample(logits)[0] == 17


def test_a_tiny_temperature_is_greedy():
    logits = random_logits(5000)
    sampler = Sampler(SamplingParams(temperature=1e-310, **OFF))
    assert sampler.sample(logits)[0] == logits.argmax()


def test_the_same_seed_gives_the_same_tokens():
    logits = random_logits(5000, scale=0.5)

    def draw(seed):
        sampler = Sampler(SamplingParams(seed=seed))
        return [sampler.sample(logits)[0] for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    drawn = Sampler(SamplingParams())
    assert draw(drawn.seed) == [drawn.sample(logits)[0] for _ in range(20)]


def test_logprob_is_that_of_the_model():
    logits = random_logits(5000)
    sampler = Sampler(SamplingParams(temperature=0.3, repeat_penalty=2.0, seed=0))
    token, logprob = sampler.sample(logits, [1, 2, 3])
    exact = logits.astype(np.float64)
    wanted = exact[token] - exact.max() - math.log(np.exp(exact - exact.max()).sum())
    assert logprob == pytest.approx(wanted, abs=1e-5)


def test_logits_are_left_as_they_are():
    logits = random_logits(500)
    before = logits.copy()
    logits.setflags(write=False)
    Sampler(SamplingParams(repeat_penalty=1.5, presence_penalty=1)).sample(logits, [1, 2])
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("options", "history", "winner"),
    [
        ({"repeat_penalty": 2.0}, [0], 1),  # 4 -> 2 < 3
        ({"repeat_penalty": 1.2}, [0], 0),  # 4 -> 3.33 > 3
        ({"repeat_penalty": 2.0}, [0, 1, 1], 0),  # 2, 1.5: still the first
        ({"presence_penalty": 1.5}, [0, 0, 0], 1),  # 4 - 1.5
        ({"presence_penalty": 0.9}, [0, 0, 0], 0),
        ({"frequency_penalty": 0.4}, [0, 0, 0], 1),  # 4 - 1.2
        ({"frequency_penalty": 0.4}, [0, 0], 0),
        ({"repeat_penalty": 2.0, "repeat_last_n": 1}, [0, 2], 0),  # out of the window
        ({"repeat_penalty": 2.0, "repeat_last_n": 0}, [0], 0),
        ({"repeat_penalty": 2.0, "repeat_last_n": -1}, [0] + [2] * 500, 1),
        ({"repeat_penalty": 2.0}, [], 0),
    ],
)
def test_penalties(options, history, winner):
    logits = np.array([4.0, 3.0, -5.0], np.float32)
    assert Sampler(SamplingParams(temperature=0, **options)).sample(logits, history)[0] == winner


def test_a_penalty_makes_negative_logits_more_negative():
    logits = np.array([-1.0, -1.5], np.float32)
    params = SamplingParams(temperature=0, repeat_penalty=2.0)
    assert Sampler(params).sample(logits, [0])[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(temperature, bad):
    logits = random_logits(5000)
    logits[4321] = bad
    with pytest.raises(TmacError, match="no usable logits"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)
    with pytest.raises(TmacError, match="no usable logits"):
        Sampler(SamplingParams()).sample(np.full(10, -np.inf, np.float32))


@pytest.mark.parametrize("options", [{}, OFF, {**OFF, "top_p": 0.99}, {"temperature": 0}])
def test_minus_infinity_forbids_a_token(options):
    logits = np.full(300, -np.inf, np.float32)
    logits[[5, 250]] = 1.0
    sampler = Sampler(SamplingParams(**options))
    assert {sampler.sample(logits)[0] for _ in range(50)} <= {5, 250}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repeat_penalty", 0),
        ("repeat_last_n", -2),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("seed", 1.0),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name, value):
    with pytest.raises(TmacError, match=f"^{name} is .*; allowed: "):
        SamplingParams(**{name: value})


def test_numpy_numbers_are_numbers():
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))


def test_top_k_may_be_any_whole_number() -> None:
    logits = np.array([0.0, 2.0, 1.0], np.float32)
    sampler = Sampler(SamplingParams(top_k=2**70, temperature=0))
    assert sampler.sample(logits)[0] == 1
