"""How long the sampler takes for one token, by vocabulary and way of choosing.

    python bench/sampling.py

Logits are normal with a deviation of 3. All cases take turns; each line is the median (lowest to
highest) over the rounds of the median call of a window.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from measure import OtherLoad, Spread, describe, describe_load, machine_facts, positive_list

from tmac_py.sampling import Logits, Sampler, SamplingParams

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "defaults": {},
    "penalties": {"repeat_penalty": 1.1},
    "top_k=0": {"top_k": 0},
    "top_k=0, min_p=0": {"top_k": 0, "min_p": 0.0},
    "temperature alone": {"top_k": 0, "min_p": 0.0, "top_p": 1.0},
}
"""Options beside the defaults."""

CALLS = 20  # of a window


@dataclass(frozen=True)
class Row:
    """One way of choosing from one vocabulary; microseconds, one for each round."""

    vocab: int
    way: str
    samples: list[float]


def window(sampler: Sampler, logits: Logits, history: list[int]) -> float:
    """Microseconds of the median call."""
    seconds = []
    for _ in range(CALLS):
        started = perf_counter()
        sampler.sample(logits, history)
        seconds.append(perf_counter() - started)
    return median(seconds) * 1e6


def measure(vocabs: list[int], rounds: int) -> list[Row]:
    """All ways for all vocabularies."""
    rows = [Row(vocab, way, []) for vocab in vocabs for way in WAYS]
    samplers = [Sampler(SamplingParams(seed=1, **WAYS[row.way])) for row in rows]
    random = np.random.default_rng(0)
    logits = {n: (random.standard_normal(n) * 3).astype(np.float32) for n in vocabs}
    history = list(range(64))
    for _ in range(rounds):
        for row, sampler in zip(rows, samplers, strict=True):
            row.samples.append(window(sampler, logits[row.vocab], history))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--vocab", type=positive_list, default=[32000, 49152, 128256], help="sizes, as 32000,49152")
    add("--rounds", type=int, default=10, help="windows of each case (default 10)")
    add("--json", type=Path, metavar="FILE", help="write the report with all samples here as well")
    args = parser.parse_args()
    load, facts = OtherLoad(), machine_facts()
    rows = measure(args.vocab, args.rounds)
    cpus = load.cpus()
    for name, text in [*describe(facts), ("other programs", describe_load(cpus))]:
        print(f"{name:<15} {text}")
    print(f"\n{'vocabulary':>10}  {'way':<18} {'us a token':>18}")
    for row in rows:
        print(f"{row.vocab:>10}  {row.way:<18} {Spread.of(row.samples)!s:>18}")
    if args.json is not None:
        report = {"machine": facts, "other_cpus": cpus, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
