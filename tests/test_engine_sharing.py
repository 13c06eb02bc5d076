"""What the engine does beside one token after the other: shared prompts, guesses, scores, texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_model as tiny
from engine_clients import N_CTX, Client, alone, drive, prompt, request, tiny_engine_model
from tmac_py.errors import ContextError, OptionError, TmacError
from tmac_py.model import Model
from tmac_py.server.engine import Engine
from tmac_py.server.jobs import BusyError, CancelledError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with tiny_engine_model(tmp_path_factory.mktemp("engine")) as model:
        yield model


def text_that_repeats() -> np.ndarray:
    return np.tile(prompt(5, 12), 6)


@pytest.mark.parametrize("kv", ["f16", "int8/int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_for_a_client_alone_change_no_answer(
    model: Model, temperature: float, kv: str
) -> None:
    texts = (text_that_repeats(), prompt(8, 5))
    plain = [[], []]
    passes = []
    for guess in (False, True):
        engine = Engine(model, parallel=1, guess=guess, kv=kv)
        clients = [
            Client(engine, request(text, 60, temperature=temperature, seed=3, top_logprobs=2))
            for text in texts
        ]
        drive(engine)
        for client, steps in zip(clients, plain, strict=True):
            found = [(s.token.id, s.token.logprob, s.top) for s in client.steps]
            steps[:] = steps or found
            assert found == steps
        assert engine.counters.decode_tokens == 2 * 59
        passes.append(engine.counters.n_decode)
        again = Client(engine, request(texts[1], 60, seed=3, temperature=temperature))
        drive(engine)
        assert again.ids == [row[0] for row in plain[1]]
    assert passes[0] == 2 * 59
    if temperature == 0:
        assert passes[1] < passes[0], "a greedy answer of this model repeats itself"


def test_guesses_respect_stop_strings_and_the_context(model: Model) -> None:
    [steps] = alone(model, request(text_that_repeats(), 60))
    text = "".join(step.token.text for step in steps)
    stop = text[len(text) // 2 :][:4]
    engine = Engine(model, parallel=1)
    client = Client(engine, request(text_that_repeats(), 60, stop=(stop,)))
    drive(engine)
    assert "".join(step.token.text for step in client.steps) == text[: text.index(stop)]
    full = Client(engine, request(text_that_repeats(), -1))
    drive(engine)
    assert len(full.steps) == N_CTX - len(text_that_repeats())
    assert full.ids[:60] == [step.token.id for step in steps]


def test_a_slot_at_work_lends_the_beginning_of_a_prompt(model: Model) -> None:
    """While it decodes; with the same bits only what was computed in whole chunks."""
    shared = prompt(1, 150)
    longer = np.concatenate([shared, prompt(2, 20)])
    for reuse, n_cached in (("any", 150), ("same bits", 128), ("none", 0)):
        [expected] = alone(model, request(longer, 10, reuse=reuse))
        engine = Engine(model, parallel=2)
        first = Client(engine, request(shared, 60))
        while not first.steps:
            engine.step()
        second = Client(engine, request(longer, 10, reuse=reuse))
        drive(engine)
        assert second.steps[0].token.timings.n_cached == n_cached
        assert engine.counters.prompt_tokens == 150 + 170 - n_cached
        assert first.ids == [s.token.id for s in alone(model, request(shared, 60))[0]]
        if reuse != "any":
            assert [s.token.logprob for s in second.steps] == [s.token.logprob for s in expected]


def test_a_cache_of_codes_lends_what_it_can(model: Model) -> None:
    """Whole blocks of 64 of what is older than the newest 256 tokens; the same bits as alone."""
    shared = prompt(1, 370)
    for n in (365, 150, 70):
        longer = np.concatenate([shared[:n], prompt(2, 9)])
        engine = Engine(model, parallel=1, kv="int4")
        expected = Client(engine, request(longer, 10, reuse="same bits"))
        drive(engine)
        engine = Engine(model, parallel=2, kv="int4")
        first = Client(engine, request(shared, 20))
        while not first.steps:
            engine.step()
        second = Client(engine, request(longer, 10, reuse="same bits"))
        drive(engine)
        assert second.steps[0].token.timings.n_cached == n // 64 * 64
        assert [s.token.logprob for s in second.steps] == [s.token.logprob for s in expected.steps]


@pytest.mark.parametrize("reuse", ["any", "same bits"])
def test_requests_that_begin_alike_compute_it_once(model: Model, reuse: str) -> None:
    """Those that come at the same time too: the later ones wait for the first."""
    shared = prompt(1, 200)
    wanted = [
        request(np.concatenate([shared, prompt(9 + i, 5 + i)]), 8, reuse=reuse, seed=i)
        for i in range(4)
    ]
    expected = alone(model, *wanted)
    engine = Engine(model, parallel=4)
    clients = [Client(engine, one) for one in wanted]
    drive(engine)
    known = 200 if reuse == "any" else 192
    cached = [client.steps[0].token.timings.n_cached for client in clients]
    assert cached == [0, known, known, known]
    assert engine.counters.prompt_tokens == sum(205 + i for i in range(4)) - 3 * known
    for client, steps in zip(clients, expected, strict=True):
        if reuse == "same bits":
            assert [s.token.logprob for s in client.steps] == [s.token.logprob for s in steps]
        assert len(client.steps) == 8


def test_those_who_wait_go_on_when_the_first_is_cancelled(model: Model) -> None:
    wanted = [request(prompt(1, 300), 4, seed=i, reuse="same bits") for i in range(3)]
    [expected] = alone(model, wanted[0])
    engine = Engine(model, parallel=3)
    clients = [Client(engine, one) for one in wanted]
    engine.step()
    engine.cancel(clients[0].job)
    drive(engine)
    for client in clients[1:]:
        assert client.steps[0].token.timings.n_cached in (0, 64)
        assert client.ids == [s.token.id for s in expected]


def test_scores_of_a_prompt(model: Model) -> None:
    """Those of the model's logits after each token; the answer stays what it was."""
    for n in (1, 20, 64, 150):
        ids = prompt(n, n)
        [plain] = alone(model, request(ids, 5, top_logprobs=2))
        [steps] = alone(model, request(ids, 5, top_logprobs=2, score_prompt=True))
        scores, answer = steps[:n], steps[n:]
        assert [(s.token.id, s.token.logprob, s.top) for s in answer] == [
            (s.token.id, s.token.logprob, s.top) for s in plain
        ]
        assert [s.token.id for s in scores] == ids.tolist()
        assert {s.token.n_gen for s in scores} == {0}
        assert np.isnan(scores[0].token.logprob)
        cache = model.new_cache()
        parts = [ids[i : i + 64] for i in range(0, n, 64)]
        logits = np.concatenate([model.forward(part, cache, "all") for part in parts])
        logits = logits.astype(np.float64)
        want = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        want -= logits.max(1, keepdims=True)
        found = [s.token.logprob for s in scores[1:]]
        assert found == pytest.approx(want[np.arange(n - 1), ids[1:]].tolist(), abs=1e-5)
        for row, step in zip(want, scores[1:], strict=False):
            assert step.top[0] == (row.argmax(), pytest.approx(row.max(), abs=1e-5))


def test_scores_change_no_bit_where_a_cache_forgets_more(tmp_path: Path) -> None:
    """Of 570 positions int4 has no longer in fp16 the block in which the second chunk began."""
    file = tiny.write_tiny_model(
        tmp_path / "tiny.lut",
        max_position_embeddings=600,
        special=("embed",),
        quantize=tiny.flat_head,
    )
    ids = prompt(2, 570)
    with Model.load(file, threads=1) as model:
        [plain], [scored] = (
            alone(model, request(ids, 3, score_prompt=scores), chunk=300, kv="int4")
            for scores in (False, True)
        )
    assert [s.token.logprob for s in scored[570:]] == [s.token.logprob for s in plain]


class Vectors:
    """Collects what the engine says to one client who wants embeddings."""

    def __init__(self, engine: Engine, texts: list[np.ndarray], **options) -> None:
        self.result: object = None
        self.job = engine.submit_embedding(texts, self, **options)

    def __call__(self, event: object) -> None:
        assert self.result is None
        self.result = event


def test_embeddings_take_turns_with_prompts_and_answers(model: Model) -> None:
    texts = [prompt(i, n) for i, n in enumerate((5, 100, 30, 3, 200))]
    expected = model.embed([text.tolist() for text in texts])
    engine = Engine(model, parallel=2, guess=False)
    talker = Client(engine, request(prompt(1, 4), 60))
    engine.step()
    vectors = Vectors(engine, texts)
    reader = Client(engine, request(prompt(2, 200), 3))
    while vectors.result is None:
        spoken, computed = len(talker.steps), engine.counters.prompt_tokens
        assert engine.step()
        assert len(talker.steps) == spoken + 1
        assert engine.counters.prompt_tokens - computed <= 64 + 16
    assert reader.steps, "its prompt was computed in between"
    np.testing.assert_array_equal(np.stack(vectors.result), expected)
    drive(engine)
    last = Vectors(engine, texts[:1], pooling="last")
    drive(engine)
    np.testing.assert_array_equal(
        last.result[0], model.embed([texts[0].tolist()], pooling="last")[0]
    )
    assert engine.counters.finished == 4


def test_embeddings_are_cancelled_refused_and_fail_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, max_queue=1)
    waiting, other = Vectors(engine, [prompt(1, 100)]), Vectors(engine, [prompt(2, 300)])
    with pytest.raises(BusyError, match="2 requests are waiting"):
        Vectors(engine, [prompt(1, 3)])
    assert engine.n_waiting == 2
    engine.cancel(waiting.job)
    assert isinstance(waiting.result, CancelledError)
    engine.step()
    engine.cancel(other.job)
    assert isinstance(other.result, CancelledError)
    assert not engine.step()
    with pytest.raises(ContextError, match="text 0 has 401 tokens"):
        Vectors(engine, [prompt(1, 401)])
    with pytest.raises(OptionError, match="pooling is 'max'"):
        Vectors(engine, [prompt(1, 3)], pooling="max")

    def fails(*_: object) -> None:
        raise TmacError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden_states", fails)
        unlucky = Vectors(engine, [prompt(1, 3)])
        engine.step()
    assert str(unlucky.result) == "no luck"
    ended = Vectors(engine, [prompt(1, 3)])
    engine.close()
    assert isinstance(ended.result, CancelledError)
    assert (engine.counters.cancelled, engine.counters.failed) == (3, 1)
