"""Continuous batching without HTTP: what each client gets, and when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

import tiny_model as tiny
from engine_clients import Client, alone, drive, prompt, request, tiny_engine_model
from tmac_py.errors import ContextError, OptionError, TmacError
from tmac_py.model import Model
from tmac_py.sampling import Logits
from tmac_py.server.engine import Engine
from tmac_py.server.fair_queue import FairQueue
from tmac_py.server.jobs import BusyError, CancelledError, Request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with tiny_engine_model(tmp_path_factory.mktemp("engine")) as model:
        yield model


def mixed_requests() -> list[Request]:
    """Prompts below and above a chunk, greedy and seeded, answers of several lengths."""
    return [
        request(prompt(i, 3 + 29 * i), 5 + 3 * i, temperature=float(i % 2), seed=i, top_logprobs=2)
        for i in range(6)
    ]


@pytest.mark.parametrize("parallel", [2, 6, 20])
def test_each_gets_together_what_it_gets_alone(model: Model, parallel: int) -> None:
    expected = alone(model, *mixed_requests())
    assert all(len({s.token.id for s in steps}) > 4 for steps in expected[1::2])
    engine = Engine(model, parallel=parallel)
    clients = [Client(engine, one) for one in mixed_requests()]
    drive(engine)
    for client, steps in zip(clients, expected, strict=True):
        found = [(s.token.text, s.token.id, s.token.logprob, s.top) for s in client.steps]
        assert found == [(s.token.text, s.token.id, s.token.logprob, s.top) for s in steps]
        assert client.steps[-1].token.finish_reason == "length"
    assert engine.counters.finished == 6
    if parallel >= 6:
        counters = engine.counters
        assert counters.n_decode < counters.decode_tokens / 2, "answers share passes"


def test_answers_are_those_of_the_model(model: Model) -> None:
    ids = prompt(9, 20)
    bias = {2: -np.inf}
    for temperature in (0.0, 1.0):
        result = model.generate(
            ids.tolist(), max_tokens=30, temperature=temperature, seed=7, logit_bias=bias
        )
        [steps] = alone(model, request(ids, 30, temperature=temperature, seed=7))
        assert "".join(step.token.text for step in steps) == result
        assert [step.token.id for step in steps] == list(result.ids)
        assert [step.token.logprob for step in steps] == list(result.logprobs)
        text = str(result)
        stop = text[len(text) // 2 :][:3]
        expected = model.generate(
            ids.tolist(), max_tokens=30, temperature=temperature, seed=7, logit_bias=bias, stop=stop
        )
        [steps] = alone(model, request(ids, 30, temperature=temperature, seed=7, stop=(stop,)))
        assert "".join(step.token.text for step in steps) == expected
        assert steps[-1].token.finish_reason == "stop"


def test_in_a_thread_of_its_own(model: Model) -> None:
    expected = alone(model, *mixed_requests())
    engine = Engine(model, parallel=3)
    engine.start()
    try:
        clients = [Client(engine, one) for one in mixed_requests()]
        for client, steps in zip(clients, expected, strict=True):
            assert client.ended.wait(60)
            assert client.ids == [step.token.id for step in steps]
    finally:
        engine.close()
    with pytest.raises(TmacError, match="shutting down"):
        engine.submit(request(prompt(0, 3)), lambda _: None)


def test_closing_ends_everything(model: Model) -> None:
    engine = Engine(model, parallel=1)
    engine.start()
    clients = [Client(engine, request(prompt(i, 5), 390)) for i in range(3)]
    engine.close()
    for client in clients:
        assert client.ended.is_set()
    assert isinstance(clients[2].error, CancelledError)
    engine.close()


def test_a_cancelled_request_frees_its_slot_before_the_next_step(model: Model) -> None:
    engine = Engine(model, parallel=1, guess=False)
    first = Client(engine, request(prompt(1, 5), 200))
    waiting, last = Client(engine, request(prompt(2, 5))), Client(engine, request(prompt(3, 5), 3))
    for _ in range(4):
        engine.step()
    assert (len(first.steps), engine.n_active, engine.n_waiting) == (4, 1, 2)
    engine.cancel(waiting.job)
    assert isinstance(waiting.error, CancelledError)
    engine.cancel(first.job)
    engine.step()
    assert isinstance(first.error, CancelledError)
    assert len(last.steps) == 1
    assert drive(engine) == 2
    assert (engine.counters.cancelled, engine.counters.finished) == (2, 1)


def test_a_prompt_can_be_cancelled_half_way(model: Model) -> None:
    engine = Engine(model, parallel=1, chunk=16, guess=False)
    long = Client(engine, request(prompt(1, 300)))
    engine.step()
    engine.step()
    engine.cancel(long.job)
    other = Client(engine, request(prompt(2, 5), 1))
    engine.step()
    assert isinstance(long.error, CancelledError)
    assert other.steps
    assert engine.counters.prompt_tokens == 32 + 5


def test_a_long_prompt_stalls_nobody_for_more_than_a_chunk(model: Model) -> None:
    """Answers get a token in every step; a short prompt's turn comes after one chunk of a long."""
    engine = Engine(model, parallel=4, chunk=16, guess=False)
    talker = Client(engine, request(prompt(1, 4), 60))
    engine.step()
    long = [Client(engine, request(prompt(2 + i, 320), 1)) for i in range(2)]
    engine.step()
    short = Client(engine, request(prompt(8, 10), 60))
    for n in range(2, 12):
        assert len(talker.steps) == n
        before = engine.counters.prompt_tokens
        engine.step()
        assert engine.counters.prompt_tokens - before <= 16
    assert len(short.steps) >= 12 - 2 - 2, "two long prompts are ahead of it, one chunk each"
    assert not long[0].steps
    drive(engine)
    assert all(len(client.steps) == 1 for client in long)


def test_a_client_with_many_requests_does_not_keep_others_out(model: Model) -> None:
    engine = Engine(model, parallel=1)
    greedy = [Client(engine, request(prompt(i, 3), 2, client="greedy")) for i in range(5)]
    modest = Client(engine, request(prompt(9, 3), 2, client="modest"))
    while not modest.ended.is_set():
        engine.step()
    assert [client.ended.is_set() for client in greedy] == [True, False, False, False, False]


def test_the_queue_takes_turns() -> None:
    queue: FairQueue[int] = FairQueue()
    for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)):
        queue.push(client, item)
    assert queue.remove("a", 2)
    assert not queue.remove("a", 2)
    assert not queue.remove("d", 2)
    assert len(queue) == 5
    assert [queue.pop() for _ in range(5)] == [1, 4, 5, 3, 6]
    with pytest.raises(LookupError):
        queue.pop()


def test_an_error_in_one_request_stays_there(model: Model) -> None:
    def fails(ids: np.ndarray, _: Logits) -> None:
        if len(ids) == 8:
            raise RuntimeError("a processor's fault")

    expected = alone(model, request(prompt(1, 5)), request(prompt(2, 5)))
    engine = Engine(model, parallel=3)
    good = Client(engine, request(prompt(1, 5)))
    bad = Client(engine, request(prompt(3, 5), processors=(fails,)))
    nothing = np.full(tiny.VOCAB, -np.inf, np.float32)
    worse = Client(engine, request(prompt(4, 5), processors=(lambda *_: nothing,)))
    also_good = Client(engine, request(prompt(2, 5)))
    drive(engine)
    assert (str(bad.error), len(bad.steps)) == ("a processor's fault", 3)
    assert isinstance(worse.error, TmacError)
    for client, steps in zip((good, also_good), expected, strict=True):
        assert client.ids == [step.token.id for step in steps]
    assert engine.counters.failed == 2


def test_a_pass_that_fails_is_tried_again_for_each_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, parallel=3)
    clients = [Client(engine, request(prompt(i, 5), 6)) for i in range(3)]
    engine.step()
    broken = engine._slots[1].cache
    forward = model.forward_batch

    def failing(ids, caches, logits="last"):
        if any(cache is broken for cache in caches):
            raise TmacError("this cache is broken")
        return forward(ids, caches, logits)

    monkeypatch.setattr(model, "forward_batch", failing)
    drive(engine)
    assert [len(client.steps) for client in clients] == [6, 1, 6]
    assert str(clients[1].error) == "this cache is broken"


def test_a_client_that_fails_to_listen_is_gone(model: Model) -> None:
    engine = Engine(model, parallel=1)

    def broken(_: object) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(request(prompt(1, 5), 100), broken)
    other = Client(engine, request(prompt(2, 5), 2))
    assert drive(engine) <= 4
    assert other.ended.is_set()


def test_the_slot_that_holds_most_of_the_prompt_is_taken(model: Model) -> None:
    engine = Engine(model, parallel=3)
    texts = [prompt(i, 30) for i in range(3)]
    for text in texts:
        Client(engine, request(text, 4))
    drive(engine)
    for i in (1, 0, 2, 1):
        longer = np.concatenate([texts[i][:25], prompt(50 + i, 6)])
        client = Client(engine, request(longer, 2))
        drive(engine)
        assert client.steps[-1].token.timings.n_cached >= 25
    for reuse, n_cached in (("none", 0), ("same bits", 0), ("any", 29)):
        client = Client(engine, request(texts[2], 2, reuse=reuse))
        drive(engine)
        assert client.steps[-1].token.timings.n_cached == n_cached
    fresh = Client(engine, request(prompt(99, 30), 1))
    drive(engine)
    assert fresh.steps[-1].token.timings.n_cached == 0
    again = Client(engine, request(texts[2], 1))
    drive(engine)
    assert again.steps[-1].token.timings.n_cached == 29, "the oldest slot was given away, not this"


@pytest.mark.parametrize("reuse", ["same bits", "none"])
def test_a_request_repeats_its_bits_whatever_the_slots_hold(model: Model, reuse: str) -> None:
    text = prompt(1, 150)
    [expected] = alone(model, request(text, 20, reuse=reuse))
    engine = Engine(model, parallel=1)
    others = [
        np.concatenate([text[:n], prompt(2, extra)])
        for n, extra in ((150, 0), (140, 60), (70, 5), (64, 1), (20, 200), (128, 30))
    ]
    found = []
    for other, other_reuse in itertools.product(others, ("any", "same bits")):
        Client(engine, request(other, 30, reuse=other_reuse))
        drive(engine)
        client = Client(engine, request(text, 20, reuse=reuse))
        drive(engine)
        assert [s.token.logprob for s in client.steps] == [s.token.logprob for s in expected]
        found.append(client.steps[-1].token.timings.n_cached)
    assert set(found) == ({0} if reuse == "none" else {0, 64, 128})


@pytest.mark.parametrize(
    ("chunk", "reuse", "n_cached"), [(64, "same bits", 64), (48, "same bits", 0), (64, "any", 64)]
)
def test_a_cache_of_codes_forgets_more_than_it_was_asked_to(
    model: Model, chunk: int, reuse: str, n_cached: int
) -> None:
    """The block that a long text's beginning ends in is computed again."""
    text = prompt(1, 100)
    answers = []
    for first in (None, np.concatenate([text[:99], prompt(2, 280)])):
        engine = Engine(model, parallel=1, kv="int4", chunk=chunk)
        if first is not None:
            Client(engine, request(first, 2))
            drive(engine)
        client = Client(engine, request(text, 20, reuse=reuse))
        drive(engine)
        answers.append(client.steps)
    fresh, again = answers
    assert again[-1].token.timings.n_cached == n_cached
    if reuse == "same bits":
        assert [s.token.logprob for s in again] == [s.token.logprob for s in fresh]


def test_what_cannot_run_is_refused(model: Model) -> None:
    engine = Engine(model, parallel=1, n_ctx=20, max_queue=1)
    with pytest.raises(ContextError, match="the prompt has 20 tokens, the context holds 20"):
        Client(engine, request(prompt(1, 20)))
    with pytest.raises(OptionError, match="outside the vocabulary"):
        Client(engine, request(np.array([tiny.VOCAB], np.int32)))
    with pytest.raises(OptionError, match="no tokens"):
        Client(engine, request(np.array([], np.int32)))
    with pytest.raises(OptionError, match="max_tokens is 0; allowed: 1 up, or -1"):
        Client(engine, request(prompt(1, 3), 0))
    whole = Client(engine, request(prompt(1, 3), -1))
    Client(engine, request(prompt(1, 3), 1))
    with pytest.raises(BusyError, match="2 requests are waiting"):
        Client(engine, request(prompt(1, 3)))
    drive(engine)
    assert len(whole.steps) == 17
    for options in ({"parallel": 0}, {"parallel": 257}, {"chunk": 0}, {"max_queue": -1}):
        with pytest.raises(OptionError, match="allowed"):
            Engine(model, **options)
    with pytest.raises(ContextError, match="n_ctx is 401"):
        Engine(model, n_ctx=401)
