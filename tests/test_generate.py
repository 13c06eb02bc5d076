"""The loop over tokens with a model that says what it is told to."""

import copy
import itertools
import pickle

import numpy as np
import pytest

from tiny_vocab import byte_level_json, sentencepiece_model
from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.errors import TmacError
from tmac_py.generate import Result, StopFinder, check_stop, stream_tokens
from tmac_py.sampling import Sampler, SamplingParams
from tmac_py.tokenizer import IncrementalDecoder, Tokenizer


class Cache:
    def __init__(self):
        self.pos = 0


class Script:
    """A model whose greedy answer is the given ids, whatever the prompt; counts what it is fed."""

    def __init__(self, answer, vocab):
        self.answer = list(answer)
        self.vocab = vocab
        self.calls = []

    def __call__(self, ids, cache):
        assert ids.dtype == np.int32
        self.calls.append(ids.tolist())
        cache.pos += len(ids)
        logits = np.zeros(self.vocab, np.float32)
        step = sum(len(call) == 1 for call in self.calls[1:])
        logits[self.answer[min(step, len(self.answer) - 1)]] = 10
        return logits


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({"tokenizer.json": byte_level_json()})


def start(tokenizer, answer, *, prompt=(5, 6, 7), max_tokens=100, stop=(), eos=(2,), **options):
    ids = tokenizer.encode(answer, add_special=False) if isinstance(answer, str) else answer
    model, cache = Script(ids, tokenizer.vocab_size), Cache()
    stream = stream_tokens(
        model,
        cache,
        np.array(prompt, np.int32),
        decoder=IncrementalDecoder(tokenizer),
        sampler=Sampler(SamplingParams(temperature=0)),
        eos_ids=eos,
        max_tokens=max_tokens,
        stop=stop,
        **options,
    )
    return stream, model, cache


def text_of(tokens):
    return "".join(token.text for token in tokens)


def test_an_end_token_ends_the_answer(tokenizer):
    ids = [*tokenizer.encode("the cat 🙂", add_special=False), 2]
    stream, model, cache = start(tokenizer, ids)
    tokens = list(stream)
    assert text_of(tokens) == "the cat 🙂"
    assert [token.id for token in tokens] == ids
    assert [token.finish_reason for token in tokens] == [None] * (len(ids) - 1) + ["stop"]
    assert [token.n_gen for token in tokens] == list(range(1, len(ids) + 1))
    assert all(token.n_prompt == 3 for token in tokens)
    assert all(token.logprob < 0 for token in tokens)
    assert model.calls == [[5, 6, 7], *[[i] for i in ids[:-1]]]
    assert cache.pos == 3 + len(ids) - 1


def test_a_limit_ends_the_answer_and_is_the_reason(tokenizer):
    stream, model, _ = start(tokenizer, "the cat sat on the mat", max_tokens=3)
    tokens = list(stream)
    assert len(tokens) == 3
    assert tokens[-1].finish_reason == "length"
    assert len(model.calls) == 3


def test_an_end_token_at_the_limit_is_a_stop(tokenizer):
    stream, _, _ = start(tokenizer, [200, 2], max_tokens=2)
    assert list(stream)[-1].finish_reason == "stop"


def test_a_character_cut_by_the_limit_is_replaced(tokenizer):
    ids = tokenizer.encode("x🙂", add_special=False)
    stream, _, _ = start(tokenizer, ids, max_tokens=len(ids) - 1)
    tokens = list(stream)
    assert text_of(tokens) == "x\ufffd"
    assert text_of(tokens[:-1]) == "x"


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer):
    answer = "the cat sat on the mat"
    stream, model, _ = start(tokenizer, answer, stop=["at on t"])
    tokens = list(stream)
    assert text_of(tokens) == "the cat s"
    assert tokens[-1].finish_reason == "stop"
    assert len(model.calls) == len(tokens)
    shown = itertools.accumulate(token.text for token in tokens)
    assert all("the cat s".startswith(text) for text in shown)


def test_text_that_only_began_a_stop_string_is_shown_after_all(tokenizer):
    stream, _, _ = start(tokenizer, "the cat", max_tokens=4, stop=["catalogue", "tx"])
    ids = tokenizer.encode("the cat", add_special=False)
    assert text_of(stream) == tokenizer.decode((ids + ids[-1:] * 4)[:4])
    stream, _, _ = start(tokenizer, [*ids, 2], stop=["catalogue"])
    assert text_of(stream) == "the cat"


def test_stop_strings_with_characters_of_several_bytes(tokenizer):
    stream, _, _ = start(tokenizer, "hello 🙂🙃 world", stop=["🙃"])
    assert text_of(stream) == "hello 🙂"


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["abc", "b"], "xxabcx", "xxa"),
        (["aab"], "aaab", "a"),
        (["abab", "bb"], "ababb", ""),
        (["bb", "abb"], "xabb", "x"),
        (["z"], "abc", None),
        (["abcd"], "abc", None),
        ([], "abc", None),
        (["\n\n"], "a\n\nb", "a"),
    ],
)
def test_the_cut_does_not_depend_on_how_text_arrives(stop, text, shown, pieces):
    finder = StopFinder(stop)
    parts = [text[i : i + pieces] for i in range(0, len(text), pieces)]
    out = "".join(finder.push(part) for part in parts)
    assert finder.found == (shown is not None)
    assert out + finder.flush() == (text if shown is None else shown)


def test_the_prompt_goes_in_chunks(tokenizer):
    seen = []
    prompt = np.arange(2 * PREFILL_CHUNK + 1) % 200
    stream, model, _ = start(
        tokenizer, [200], prompt=prompt, max_tokens=1, progress=lambda *done: seen.append(done)
    )
    list(stream)
    assert [len(call) for call in model.calls] == [PREFILL_CHUNK, PREFILL_CHUNK, 1]
    assert list(itertools.chain(*model.calls)) == prompt.tolist()
    n = len(prompt)
    assert seen == [(PREFILL_CHUNK, n), (2 * PREFILL_CHUNK, n), (n, n)]


def test_nothing_runs_before_the_first_token_and_closing_stops_at_once(tokenizer):
    stream, model, cache = start(tokenizer, "the cat sat")
    assert model.calls == []
    next(stream)
    next(stream)
    stream.close()
    assert len(model.calls) == 2
    assert cache.pos == 4
    assert list(stream) == []


def test_an_interrupt_in_the_model_reaches_the_caller(tokenizer):
    def interrupted(*_):
        raise KeyboardInterrupt

    stream = stream_tokens(
        interrupted,
        Cache(),
        np.array([1], np.int32),
        decoder=IncrementalDecoder(tokenizer),
        sampler=Sampler(SamplingParams()),
        eos_ids=(),
        max_tokens=1,
    )
    with pytest.raises(KeyboardInterrupt):
        next(stream)


def test_rates_count_the_first_token_to_prefill(tokenizer, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("tmac_py.generate.perf_counter", lambda: float(next(ticks)))
    stream, _, _ = start(tokenizer, "the cat sat on the mat", max_tokens=4)
    first, *_, last = list(stream)
    assert (first.prompt_tps, first.gen_tps) == (3.0, 0.0)  # 3 tokens in one tick
    assert (last.prompt_tps, last.gen_tps) == (3.0, 1.0)  # 3 steps in 3 ticks
    assert last.timings.gen_seconds == 3.0


def test_penalties_see_prompt_and_answer(tokenizer):
    stream = stream_tokens(
        lambda *_: np.array([3.0, 2.9, 2.8, 0.0], np.float32),
        Cache(),
        np.array([0], np.int32),
        decoder=IncrementalDecoder(tokenizer),
        sampler=Sampler(SamplingParams(temperature=0, presence_penalty=1.0)),
        eos_ids=(),
        max_tokens=3,
    )
    assert [token.id for token in stream] == [1, 2, 0]


def test_sentencepiece_answers_keep_their_space_unless_trimmed():
    tokenizer = Tokenizer({"tokenizer.model": sentencepiece_model()})
    ids = tokenizer.encode("the cat", add_special=False)
    for trim, wanted in ((False, " the cat"), (True, "the cat")):
        stream = stream_tokens(
            Script([*ids, 2], tokenizer.vocab_size),
            Cache(),
            np.array([1, 5], np.int32),
            decoder=IncrementalDecoder(tokenizer, trim_space=trim),
            sampler=Sampler(SamplingParams(temperature=0)),
            eos_ids={2},
            max_tokens=10,
        )
        assert text_of(stream) == wanted


def test_a_result_is_its_text(tokenizer):
    stream, _, _ = start(tokenizer, "the cat sat", max_tokens=3)
    tokens = list(stream)
    result = Result(tokens, seed=7)
    assert result == text_of(tokens)
    assert type(result.text) is str
    assert result.ids == tuple(token.id for token in tokens)
    assert result.logprobs == tuple(token.logprob for token in tokens)
    assert (result.finish_reason, result.seed) == ("length", 7)
    assert result.timings == tokens[-1].timings
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other == result
        assert vars(other) == vars(result)


def test_stop_strings_are_checked():
    assert check_stop("ab") == ("ab",)
    assert check_stop(["a", "b"]) == ("a", "b")
    for bad in ("", [""], [3], [None]):
        with pytest.raises(TmacError, match="stop is"):
            check_stop(bad)
