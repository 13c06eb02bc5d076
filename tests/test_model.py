"""Model on tiny random weights: caches, threads, instruction sets, limits, closing."""

import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import tiny_model as tiny
import tmac_py
from tmac_py import _core
from tmac_py.errors import ContextError, ModelFileError, OptionError, TmacError
from tmac_py.linear import LutLinear
from tmac_py.model import Model
from tmac_py.quant import quantize_rtn

IDS = np.random.default_rng(3).integers(0, tiny.VOCAB, 40).astype(np.int32)
ISAS = [isa["name"] for isa in _core.isas() if isa["usable"]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.lut")


@pytest.fixture(scope="module")
def model(path):
    with Model.load(path, threads=2) as model:
        yield model


@pytest.fixture
def restore_isa():
    active = _core.active_isa()
    yield
    _core.use_isa(active)


def test_shapes_and_types(model):
    cache = model.new_cache(50)
    last = model.forward(IDS[:5], cache)
    assert (last.shape, last.dtype) == ((tiny.VOCAB,), np.float32)
    every = model.forward(IDS[5:8], cache, "all")
    assert every.shape == (3, tiny.VOCAB)
    assert (cache.pos, cache.n_ctx) == (8, 50)
    assert model.logits(IDS).shape == (len(IDS), tiny.VOCAB)
    assert np.isfinite(every).all()
    assert every.std() > 0.01


@pytest.mark.parametrize("tables", ["int8", "exact"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prefill_equals_single_steps_bit_for_bit(tmp_path, tables, bits):
    file = tiny.write_tiny_model(tmp_path / "m.lut", bits=bits, tie_word_embeddings=False)
    with Model.load(file, threads=2, tables=tables) as model:
        cache = model.new_cache()
        single = np.stack([model.forward(IDS[i : i + 1], cache) for i in range(len(IDS))])
        if tables == "exact":
            assert np.array_equal(model.logits(IDS), single)
        cuts = [1, 3, 20] if tables == "exact" else [1, 3, 12, 28]
        split = model.new_cache()
        parts = [model.forward(part, split, "all") for part in np.split(IDS, cuts)]
        assert np.array_equal(np.concatenate(parts), single)


TERNARY = ("q_proj", "o_proj", "up_proj", "down_proj")
"""Beside matrices of another encoding that read the same input, and alone."""


@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
def test_ternary_prefill_equals_single_steps_bit_for_bit(tmp_path, tables):
    file = tiny.write_tiny_model(tmp_path / "m.lut", special=TERNARY)
    with Model.load(file, threads=2, tables=tables) as model:
        cache = model.new_cache()
        single = np.stack([model.forward(IDS[i : i + 1], cache) for i in range(len(IDS))])
        if tables != "int8":
            assert np.array_equal(model.logits(IDS), single)
        split = model.new_cache()
        parts = [model.forward(part, split, "all") for part in np.split(IDS, [1, 3, 12, 28])]
        assert np.array_equal(np.concatenate(parts), single)


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", ISAS)
def test_ternary_weights_are_the_same_as_bit_planes(tmp_path, isa):
    """Integer sums of 8-bit activations: not one bit differs."""
    _core.use_isa(isa)
    answers = []
    for quantize in (tiny.ternary, tiny.ternary_as_uniform):
        file = tiny.write_tiny_model(tmp_path / "m.lut", special=TERNARY, quantize=quantize)
        with Model.load(file, threads=2, tables="exact8") as model:
            answers.append(model.logits(IDS))
    assert np.array_equal(*answers)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tables", ["int8", "exact"])
@pytest.mark.parametrize("special", [("embed", "proj", "lm_head"), ("q_proj", "o_proj", "up_proj")])
def test_binary_coded_prefill_equals_single_steps_bit_for_bit(tmp_path, special, tables, bits):
    file = tiny.write_tiny_model(
        tmp_path / "m.lut",
        special=special,
        quantize=partial(tiny.binary, bits=bits),
        tie_word_embeddings=False,
    )
    with Model.load(file, threads=2, tables=tables) as model:
        cache = model.new_cache()
        single = np.stack([model.forward(IDS[i : i + 1], cache) for i in range(len(IDS))])
        assert np.array_equal(model.logits(IDS), single)


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", ISAS)
def test_one_plane_beside_more_takes_integers_in_long_prompts(tmp_path, isa):
    """As the same codes stored with two bits do; a model of nothing else looks them up."""
    _core.use_isa(isa)
    answers = []
    for bits in (1, 2):
        file = tiny.write_tiny_model(
            tmp_path / "m.lut",
            special=("q_proj", "down_proj"),
            quantize=lambda weights, bits=bits: replace(
                quantize_rtn(weights, bits=1, group_size=32), bits=bits
            ),
        )
        with Model.load(file, threads=2, tables="int8") as model:
            answers.append(model.logits(IDS))
    assert len(IDS) > 16
    assert np.array_equal(*answers)


def test_binary_coded_weights_are_those_of_uniform_codes(tmp_path):
    """But for rounding of the offsets to fp16."""
    logits = []
    for quantize in (tiny.asymmetric, tiny.binary):
        file = tiny.write_tiny_model(tmp_path / "m.lut", special=("proj",), quantize=quantize)
        with Model.load(file, threads=2, tables="exact") as model:
            logits.append(model.logits(IDS))
    uniform, binary = logits
    assert np.abs(binary - uniform).max() < 0.01 * uniform.std()
    assert np.any(binary != uniform)


def test_more_ids_than_one_chunk(tmp_path):
    file = tiny.write_tiny_model(tmp_path / "long.lut", max_position_embeddings=600)
    with Model.load(file, threads=1, tables="exact") as model:
        ids = np.resize(IDS, 530)
        cache = model.new_cache()
        assert np.array_equal(model.logits(ids)[-1], model.forward(ids, cache))


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_isa_and_thread_count_gives_the_same_answer(path, threads):
    answers = set()
    for isa in ISAS:
        _core.use_isa(isa)
        assert _core.active_isa() == isa
        with Model.load(path, threads=threads, tables="exact") as model:
            answers.add(model.generate(IDS[:9].tolist(), max_tokens=12, temperature=0).ids)
    with Model.load(path, threads=1, tables="exact") as model:
        answers.add(model.generate(IDS[:9].tolist(), max_tokens=12, temperature=0).ids)
    assert len(answers) == 1


def test_a_truncated_cache_continues_from_there(model):
    cache = model.new_cache()
    model.forward(IDS[:10], cache)
    wanted = model.forward(IDS[10:14], cache, "all")
    model.forward(IDS[20:], cache)
    cache.truncate(10)
    assert cache.pos == 10
    assert np.array_equal(model.forward(IDS[10:14], cache, "all"), wanted)
    cache.truncate(0)
    assert np.array_equal(model.forward(IDS, cache, "all"), model.logits(IDS))


def test_two_threads_share_one_model(model):
    prompts = [IDS[:7].tolist(), IDS[11:30].tolist()]
    alone = [model.generate(prompt, max_tokens=30, seed=5).ids for prompt in prompts]
    together = [None, None]
    barrier = threading.Barrier(2)

    def answer(i):
        barrier.wait()
        together[i] = model.generate(prompts[i], max_tokens=30, seed=5).ids

    workers = [threading.Thread(target=answer, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert together == alone


@pytest.fixture
def long_turns():
    """A thread keeps the interpreter until it waits or gives it away itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("long_turns")
@pytest.mark.parametrize("call", ["decoder", "linear"])
def test_python_runs_while_the_core_works(model, call):
    cache = model.new_cache()
    linear = LutLinear.from_dense(np.ones((512, 512)), bits=4, threads=1)
    x = np.ones((64, 512), np.float32)
    core_works, stop, turns = [False], [False], [0]

    def count_turns():
        while not stop[0]:
            turns[0] += core_works[0]
            time.sleep(0)  # asks for the next turn, which comes when the core lets go

    counter = threading.Thread(target=count_turns)
    counter.start()
    try:
        for _ in range(200):
            cache.truncate(0)
            core_works[0] = True
            _ = model.forward(IDS, cache) if call == "decoder" else linear.forward(x)
            core_works[0] = False
            if turns[0]:
                break
    finally:
        stop[0] = True
        counter.join()
    assert turns[0]


def test_models_share_threads(path):
    with Model.load(path, threads=2) as one, Model.load(path, threads=2) as two:
        assert one._pool is two._pool
        with Model.load(path, threads=3) as other:
            assert other._pool is not one._pool


def test_a_cache_of_another_model_is_refused(model, tmp_path):
    file = tiny.write_tiny_model(tmp_path / "deep.lut", num_hidden_layers=3)
    with Model.load(file, threads=1) as other:
        cache = other.new_cache()
        with pytest.raises(OptionError, match="made for another model"):
            model.forward(IDS, cache)
        assert cache.pos == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [("this KV cache is in use by another thread", TmacError), ("broken", RuntimeError)],
)
def test_only_a_busy_cache_is_an_expected_failure(path, monkeypatch, text, kind):
    class Failing:
        def forward(self, *_args, **_options):
            raise RuntimeError(text)

    with Model.load(path, threads=1) as model:
        cache = model.new_cache()
        monkeypatch.setattr(model, "_decoder", Failing())
        with pytest.raises(kind, match=text):
            model.forward(IDS, cache)


def test_two_threads_may_not_use_one_cache(model):
    """The text on which the model recognises it is the core's."""
    cache, errors = model.new_cache(), []

    def use():
        try:
            for _ in range(300):
                cache.truncate(0)
                model.forward(IDS, cache)
        except (TmacError, RuntimeError) as error:
            errors.append(error)

    workers = [threading.Thread(target=use) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors
    assert all("in use by another thread" in str(error) for error in errors)


def test_separate_and_tied_heads(tmp_path):
    file = tiny.write_tiny_model(tmp_path / "m.lut", tie_word_embeddings=False, seed=1)
    with Model.load(file) as separate:
        assert separate.logits(IDS).shape == (len(IDS), tiny.VOCAB)


def test_generate_and_stream_agree(model):
    result = model.generate("the cat", max_tokens=10, seed=1)
    tokens = list(model.stream("the cat", max_tokens=10, seed=1))
    assert result == "".join(token.text for token in tokens)
    assert result.ids == tuple(token.id for token in tokens)
    assert result.seed == 1
    again = model.generate("the cat", max_tokens=10)
    assert model.generate("the cat", max_tokens=10, seed=again.seed) == again


def test_logprobs_are_those_of_logits(model):
    prompt = model.tokenizer.encode("the cat")
    result = model.generate(prompt, max_tokens=6, temperature=0)
    rows = model.logits([*prompt, *result.ids])[len(prompt) - 1 : -1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    wanted = [row[i] for row, i in zip(rows, result.ids, strict=True)]
    assert np.allclose(result.logprobs, wanted, atol=1e-5)
    assert list(result.ids) == rows.argmax(axis=1).tolist()


def test_bias_and_processors_choose_tokens(model):
    prompt = IDS[:5].tolist()
    biased = model.generate(prompt, max_tokens=4, temperature=0, logit_bias={77: 1000})
    assert biased.ids == (77,) * 4
    assert biased.logprobs[0] < -1  # the model's own
    seen = []

    def count_up(ids, logits):
        seen.append(ids.tolist())
        logits[:] = -np.inf
        logits[80 + len(ids)] = 0

    counted = model.generate(prompt, max_tokens=3, seed=1, logits_processor=count_up)
    assert counted.ids == (85, 86, 87)
    assert seen == [[*prompt, *counted.ids[:n]] for n in range(3)]
    order = [lambda _, logits: np.roll(logits, 5), count_up]
    assert model.generate(prompt, max_tokens=3, seed=1, logits_processor=order) == counted


def test_a_closed_stream_leaves_the_model_usable(model):
    wanted = model.generate("the cat", max_tokens=5, seed=1)
    for n in range(3):
        stream = model.stream("the cat", max_tokens=5, seed=1)
        for _ in range(n):
            next(stream)
        stream.close()
    assert model.generate("the cat", max_tokens=5, seed=1) == wanted


def test_the_context_limits_prompt_and_answer(model):
    result = model.generate(IDS.tolist(), max_tokens=-1, n_ctx=44, temperature=0)
    assert len(result.ids) <= 4
    assert result.finish_reason == ("stop" if result.ids[-1] == 2 else "length")
    with pytest.raises(ContextError, match="40 tokens, the context holds 40"):
        model.generate(IDS.tolist(), n_ctx=40)
    with pytest.raises(ContextError, match="100 tokens, the context holds 96"):
        model.stream([5] * 100)
    with pytest.raises(ContextError, match="100 tokens, the context holds 96"):
        model.logits([5] * 100)
    cache = model.new_cache(10)
    model.forward(IDS[:8], cache)
    with pytest.raises(ContextError, match="the context holds 10 and 8 are in use"):
        model.forward(IDS[:3], cache)
    assert cache.pos == 8
    for n_ctx in (-1, 97, 1.5, True):
        with pytest.raises(ContextError, match=r"n_ctx is .*; allowed: 0 to 96"):
            model.new_cache(n_ctx)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "no tokens"),
        ([-1], "token id -1 is outside the vocabulary of 320"),
        ([1, 320], "token id 320 is outside"),
        ([2**40], "outside"),
        ([1.5], "sequence of integers"),
        ([[1, 2]], "sequence of integers"),
        ([True], "sequence of integers"),
        (["a"], "sequence of integers"),
        ([[1], [1, 2]], "sequence of integers"),
    ],
)
def test_ids_that_are_none(model, ids, text):
    for call in (model.logits, model.stream, lambda ids: model.forward(ids, model.new_cache())):
        with pytest.raises(TmacError, match=text):
            call(ids)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 up, or -1"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": [""]}, "stop is ''"),
        ({"logit_bias": {10**6: 1.0}}, "a token id of logit_bias is 1000000; allowed: 0 to"),
        ({"logits_processor": 3}, "logits_processor is 3; allowed: "),
        ({"logits_processor": [3]}, r"logits_processor is \[3\]; allowed: "),
        ({"n_ctx": -1}, "n_ctx is -1"),
    ],
)
def test_arguments_are_checked_before_the_first_token(model, options, text):
    with pytest.raises(TmacError, match=text):
        model.stream("the cat", **options)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", True])
def test_threads_are_checked(path, threads):
    with pytest.raises(TmacError, match=r"threads is .*; allowed: 1 to 1024"):
        Model.load(path, threads=threads)


def test_tables_are_checked(path):
    with pytest.raises(TmacError, match="tables is 'int4'; allowed: 'int8', 'exact'"):
        Model.load(path, tables="int4")


def test_chat_prompt(model, tmp_path):
    messages = [{"role": "user", "content": "the cat"}]
    ids = model.chat_prompt(messages)
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(ids, skip_special=False) == text
    assert ids[0] == 1
    assert model.generate(ids, max_tokens=2).timings.n_prompt == len(ids)
    with Model.load(tiny.write_tiny_model(tmp_path / "base.lut", chat=False)) as base:
        assert base.chat_template is None
        with pytest.raises(TmacError, match="no chat template"):
            base.chat_prompt(messages)


def test_use_after_close(path):
    model = Model.load(path)
    stream = model.stream("the cat", max_tokens=50, temperature=0)
    next(stream)
    cache = model.new_cache()
    model.close()
    model.close()
    assert model.closed
    for call in (
        lambda: next(stream),
        lambda: model.generate("the cat"),
        lambda: model.forward([1], cache),
        lambda: model.logits([1]),
        model.new_cache,
    ):
        with pytest.raises(TmacError, match=r"tiny\.lut: the model is closed"):
            call()


def test_a_damaged_file_is_refused(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    damaged = tmp_path / "damaged.lut"
    damaged.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"damaged\.lut"):
        Model.load(damaged)
    with pytest.raises(ModelFileError, match="no such file"):
        Model.load(tmp_path / "missing.lut")


def test_a_file_without_a_tokenizer_knows_only_ids(tmp_path, model):
    with Model.load(tiny.write_tiny_model(tmp_path / "m.lut", files={})) as bare:
        assert np.array_equal(bare.logits(IDS), model.logits(IDS))
        assert bare.chat_template is None
        for call in (lambda: bare.tokenizer, lambda: bare.generate("x"), lambda: bare.stream([1])):
            with pytest.raises(ModelFileError, match=r"m\.lut: the file carries no tokenizer"):
                call()
    with pytest.raises(ModelFileError, match=r"no tokenizer: tokenizer\.json or tokenizer\.model"):
        Model.load(tiny.write_tiny_model(tmp_path / "o.lut", files={"README": b"x"}))


def test_the_package_exports_what_it_says():
    assert tmac_py.Model is Model
    for name in tmac_py.__all__:
        assert getattr(tmac_py, name) is not None
    assert set(tmac_py.__all__) <= set(dir(tmac_py))
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = tmac_py.Missing
