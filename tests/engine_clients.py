"""Clients of an engine without HTTP."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import tiny_model as tiny
from tmac_py.model import Model
from tmac_py.sampling import Sampler, SamplingParams
from tmac_py.server.engine import Engine
from tmac_py.server.jobs import Job, Request, Step

N_CTX = 400


@contextmanager
def tiny_engine_model(folder: Path) -> Iterator[Model]:
    """A model of `N_CTX` positions that can embed, and whose head has no favourite."""
    path = tiny.write_tiny_model(
        folder / "tiny.lut",
        max_position_embeddings=N_CTX,
        special=("embed",),
        quantize=tiny.flat_head,
    )
    with Model.load(path, threads=1) as model:
        yield model


def prompt(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, tiny.VOCAB, n).astype(np.int32)


def request(
    ids: np.ndarray, n: int = 12, *, temperature: float = 0.0, seed: int = 0, **options
) -> Request:
    bias = {2: -np.inf}  # no end token: an answer has n tokens
    params = SamplingParams(temperature=temperature, seed=seed, logit_bias=bias)
    processors = options.pop("processors", ())
    return Request(prompt=ids, sampler=Sampler(params, processors), max_tokens=n, **options)


class Client:
    """Collects what the engine says to one client."""

    def __init__(self, engine: Engine, wanted: Request) -> None:
        self.steps: list[Step] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.job: Job = engine.submit(wanted, self)

    def __call__(self, event: Step | Exception) -> None:
        assert not self.ended.is_set(), "told something after the end"
        if isinstance(event, Step):
            self.steps.append(event)
        else:
            self.error = event
        if isinstance(event, Exception) or event.token.finish_reason:
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [step.token.id for step in self.steps]


def drive(engine: Engine) -> int:
    """Steps until all is done."""
    return next(n for n in itertools.count() if not engine.step())


def alone(model: Model, *wanted: Request, **settings) -> list[list[Step]]:
    answers = []
    for one in wanted:
        engine = Engine(model, parallel=1, **settings)
        client = Client(engine, one)
        drive(engine)
        answers.append(client.steps)
    return answers
