"""Seeds against NumPy's own generator."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tmac_py.seeding import pcg64_state

EDGES = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 2**96, 2**128 - 1, 2**128, 2**300 + 7]


@pytest.mark.parametrize("seed", EDGES)
def test_states_are_those_of_numpy(seed: int) -> None:
    numbers = random.Random(seed)
    for value in [seed, *(numbers.getrandbits(numbers.randrange(1, 320)) for _ in range(50))]:
        state = np.random.PCG64(value).state["state"]
        assert pcg64_state(value) == (state["state"], state["inc"])
