"""What speculative decoding gains on a model of any size, if it answers as the texts say.

    python bench/speculation.py --model llama-2-7b/8:2bit

The passes over the weights are those of a shape with random weights, guessed tokens and all, and
take as long as they take; the choice of tokens follows a written answer, so that the guesses of
prompt lookup are right where a capable model's answer repeats its prompt, and wrong elsewhere. The
answers are in texts/: code edited as asked, a summary, and a story that repeats nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from measure import OtherLoad, describe, describe_load, machine_facts, positive
from numpy.typing import NDArray

from tmac_py import Model, TmacError, _core
from tmac_py.cli.progress import PhaseProgress
from tmac_py.cli.tables import format_table
from tmac_py.decoding import decode, prefill
from tmac_py.default_model import ensure_model
from tmac_py.lutfile import LutFile
from tmac_py.sampling import Sampler, SamplingParams
from tmac_py.speculative import PromptLookup, Speculation, speculate
from tmac_py.synthetic import write_synthetic
from tmac_py.tokenizer import Tokenizer

TEXTS = Path(__file__).with_name("texts")
TASKS = ("edit", "summary", "story")

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]


class Script:
    """A model's passes, with logits that choose the tokens of a text."""

    def __init__(self, model: Model, text: list[int]) -> None:
        self._model, self._text = model, text
        self.passes = 0

    def forward(
        self, ids: Ids, cache: _core.KvCache, logits: Literal["last", "all"] = "last"
    ) -> Logits:
        """As Model.forward; what follows a token of the text is its next one."""
        self.passes += 1
        begin = cache.pos
        rows = self._model.forward(ids, cache, logits)
        first = begin if logits == "all" else cache.pos - 1
        for pos, row in enumerate(np.atleast_2d(rows), first):
            row[self._text[min(pos + 1, len(self._text) - 1)]] = 1e9
        return rows


def tokens_of(tokenizer: Tokenizer, task: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """Prompt and answer, with ids below ``vocab_size``: equal ones stay equal."""
    texts = [(TEXTS / f"{task}-{part}.txt").read_text() for part in ("prompt", "answer")]
    prompt, answer = ([int(token) for token in tokenizer.encode(text)] for text in texts)
    small: dict[int, int] = {}
    for token in prompt + answer:
        small.setdefault(token, len(small) % vocab_size)
    return [small[token] for token in prompt], [small[token] for token in answer]


Decoding = Callable[..., Generator[tuple[int, float], None, None]]


def run(model: Model, prompt: list[int], answer: list[int], *, guess: bool) -> tuple[float, int]:
    """Seconds of the answer after the prompt, and passes over the weights."""
    script = Script(model, prompt + answer)
    cache = model.new_cache(len(prompt) + len(answer))
    logits = prefill(script.forward, cache, np.array(prompt, dtype=np.int32))
    sampler, history = Sampler(SamplingParams(temperature=0)), list(prompt)
    script.passes = 0
    n, start = len(answer), perf_counter()
    if guess:
        speculation = Speculation(PromptLookup())
        steps = speculate(script.forward, cache, logits, sampler, history, speculation, n)
    else:
        steps = islice(decode(script.forward, cache, logits, sampler, history), n)  # type: ignore[assignment]
    tokens = [token for token, _ in steps]
    seconds = perf_counter() - start
    if tokens != answer:
        raise RuntimeError("the text is not the one that was to be written")
    return seconds, script.passes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="llama-2-7b/8:2bit", help="a shape as tmac-bench --synthetic")
    add("-t", "--threads", type=positive, help="(default: as tmac-run)")
    add("--rounds", type=positive, default=3, help="pairs of runs (default 3)")
    args = parser.parse_args(arguments)
    load = OtherLoad()
    rows: list[tuple[str, ...]] = [
        ("task", "tokens", "plain tok/s", "guessing tok/s", "tokens a pass", "ratio of pairs")
    ]
    with tempfile.TemporaryDirectory(prefix="tmac-bench-") as folder:
        path = Path(folder) / "model.lut"
        try:
            with PhaseProgress() as progress:
                default = ensure_model("smollm2-135m", progress=progress)
            with LutFile.open(default) as file:
                tokenizer = Tokenizer(file.tokenizer, bos_id=file.config.bos_token_id)
            write_synthetic(path, args.model)
            with Model.load(path, threads=args.threads, check=False) as model:
                rows += [_row(model, tokenizer, task, args.rounds) for task in TASKS]
                threads = model.threads
        except (TmacError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    heading = [
        *describe(machine_facts()),
        ("model", f"{args.model}, {threads} threads"),
        ("others", describe_load(load.cpus())),
        ("samples", f"{args.rounds} pairs of runs; medians"),
    ]
    print(
        format_table(heading, indent=""), format_table(rows, right="lrrrrr", indent=""), sep="\n\n"
    )
    return 0


def _row(model: Model, tokenizer: Tokenizer, task: str, rounds: int) -> tuple[str, ...]:
    prompt, answer = tokens_of(tokenizer, task, model.config.vocab_size)
    plain: list[tuple[float, int]] = []
    guessing: list[tuple[float, int]] = []
    for number in range(rounds):
        for guess in (False, True) if number % 2 else (True, False):
            (guessing if guess else plain).append(run(model, prompt, answer, guess=guess))
    ratios = [a[0] / b[0] for a, b in zip(plain, guessing, strict=True)]
    rates = [len(answer) / statistics.median(run[0] for run in runs) for runs in (plain, guessing)]
    return (
        task,
        str(len(answer)),
        *(f"{rate:.1f}" for rate in rates),
        f"{len(answer) / guessing[0][1]:.2f}",
        f"{statistics.median(ratios):.2f}",
    )


if __name__ == "__main__":
    sys.exit(main())
