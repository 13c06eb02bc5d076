"""Tokens of several sequences in one call of the core: those that each sampler chooses alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tmac_py.errors import OptionError, TmacError
from tmac_py.pool import thread_pool
from tmac_py.sampling import Sampler, SamplingParams, sample_each

Logits = NDArray[np.float32]


def samplers() -> list[Sampler]:
    """Of all kinds: greedy, seeded, with bias, with penalties, with a processor."""

    def halve(_: NDArray[np.int32], scores: Logits) -> None:
        scores /= 2

    return [
        Sampler(SamplingParams(temperature=0)),
        *(Sampler(SamplingParams(temperature=1, seed=i)) for i in range(8)),
        Sampler(SamplingParams(seed=3, logit_bias={5: -np.inf, 6: 2})),
        Sampler(SamplingParams(seed=4, repeat_penalty=1.4, presence_penalty=0.5)),
        Sampler(SamplingParams(seed=5, top_k=0, top_p=1, min_p=0), [halve]),
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_each_gets_together_what_it_gets_alone(threads: int) -> None:
    rng = np.random.default_rng(1)
    together, alone = samplers(), samplers()
    histories = [rng.integers(0, 3000, 20).tolist() for _ in together]
    for _ in range(20):
        rows = list(rng.standard_normal((len(together), 3000)).astype(np.float32))
        found = sample_each(together, rows, histories, thread_pool(threads))
        assert found == [
            sampler.sample(row, history)
            for sampler, row, history in zip(alone, rows, histories, strict=True)
        ]


def test_an_error_stays_with_its_sequence() -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a processor's fault")

    good = np.arange(10, dtype=np.float32)
    unusable = np.full(10, -np.inf, np.float32)
    greedy = SamplingParams(temperature=0)
    chosen = [Sampler(greedy), Sampler(greedy), Sampler(greedy, [fails]), Sampler(greedy)]
    rows = [good, unusable, good, good[::-1].copy()]
    first, second, third, last = sample_each(chosen, rows, [[]] * 4, thread_pool(2))
    assert (first, last) == (Sampler(greedy).sample(good), Sampler(greedy).sample(rows[3]))
    assert isinstance(second, TmacError)
    assert str(second).startswith("no usable logits: all are -inf")
    assert isinstance(third, RuntimeError)
    assert sample_each([], [], [], thread_pool(2)) == []


def test_logits_are_arrays_and_no_copies_of_something_else() -> None:
    class Copied:
        def __array__(self, *_: object, **__: object) -> Logits:
            return np.zeros(40_000, np.float32)

    for row in (Copied(), [0.0, 1.0], None):
        with pytest.raises(TypeError):
            sample_each([Sampler(SamplingParams())], [row], [[]], thread_pool(1))  # type: ignore[list-item]


def test_one_sampler_is_of_one_sequence() -> None:
    sampler, row = Sampler(SamplingParams()), np.zeros(3, np.float32)
    with pytest.raises(OptionError, match="two rows must not have the same sampler"):
        sample_each([sampler, sampler], [row, row], [[], []], thread_pool(1))
