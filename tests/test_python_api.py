"""Model as programs embed it: chats, forms of answers, stops, cancelling, threads."""

from __future__ import annotations

import copy
import json
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py import Model, OptionError, TmacError
from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.generate import Result

NO_END = {2: -np.inf}
HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("api") / "tiny.lut"
    tiny.write_tiny_model(
        path, max_position_embeddings=1500, special=("embed",), quantize=tiny.flat_head
    )
    with Model.load(path, threads=2) as model:
        yield model


def test_a_chat_is_its_prompt_by_the_template(model: Model) -> None:
    expected = model.generate(model.chat_prompt(HELLO), seed=3, max_tokens=12, trim_space=True)
    assert model.chat(HELLO, seed=3, max_tokens=12) == expected
    tokens = list(model.chat(HELLO, stream=True, seed=3, max_tokens=12))
    assert tuple(token.id for token in tokens) == expected.ids


def test_templates_get_tools_and_variables(model: Model) -> None:
    template = "{{ tools[0].name }} {{ mood }} {{ messages[0].content }}"
    with Model.load(model.path, threads=1, chat_template=template) as other:
        answer = other.chat(
            HELLO, tools=[{"name": "look"}], chat_template_kwargs={"mood": "glad"}, max_tokens=1
        )
        assert answer.timings.n_prompt == len(other.tokenizer.encode("look glad the cat"))
        with pytest.raises(OptionError, match="'tools' is not a variable to choose"):
            other.chat(HELLO, chat_template_kwargs={"tools": 1})
        with pytest.raises(OptionError, match="chat_template_kwargs is 5; allowed: names"):
            other.chat(HELLO, chat_template_kwargs=5)
        names = {"mood": "glad", "self": 1}
        assert other.chat(HELLO, tools=[{}], chat_template_kwargs=names, max_tokens=1).ids
        for messages, tools, text in (("hi", None, "messages is 'hi'"), (HELLO, [1], "tools is")):
            with pytest.raises(TmacError, match=text):
                other.chat(messages, tools=tools)


def test_stop_token_ids_end_an_answer(model: Model) -> None:
    free = model.generate("the cat", seed=1, temperature=1.0, max_tokens=30, logit_bias=NO_END)
    stop = free.ids[10]
    at = free.ids.index(stop)
    ended = model.generate(
        "the cat", seed=1, temperature=1.0, logit_bias=NO_END, stop_token_ids=[stop, 5]
    )
    assert ended.ids == free.ids[: at + 1]
    assert ended.finish_reason == "stop"
    assert free.startswith(ended)
    for bad, text in (([-1], "stop_token_ids is -1"), ([tiny.VOCAB], "allowed: 0 to"), (3, ": 3;")):
        with pytest.raises(OptionError, match=text):
            model.generate("the cat", stop_token_ids=bad)


@pytest.mark.parametrize(
    ("options", "matches"),
    [
        ({"regex": "(the|cat) [0-9]{3}"}, r"(the|cat) \d{3}"),
        ({"grammar": 'start: "on " WORD "!"\nWORD: /[a-c]{2,3}/'}, r"on [a-c]{2,3}!"),
        ({"json_schema": {"enum": ["low", "high"]}}, r'"(low|high)"'),
        ({"json_schema": '{"type": "boolean"}'}, r"true|false"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_answers_have_the_form_asked_for(
    model: Model, options: dict, matches: str, seed: int
) -> None:
    answer = model.generate("the cat", temperature=1.5, seed=seed, **options)
    assert re.fullmatch(matches, answer)
    assert answer.finish_reason == "stop"
    assert model.chat(HELLO, temperature=1.5, seed=seed, **options).finish_reason == "stop"
    streamed = model.stream("the cat", temperature=1.5, seed=seed, draft="none", **options)
    assert "".join(token.text for token in streamed) == answer


def test_json_of_a_schema(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 2]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = json.loads(model.generate("the cat", json_schema=schema, seed=1))
    assert answer["age"] in (1, 2)
    assert len(answer["name"]) <= 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regex": "(("}, "regex: this regex is not supported"),
        ({"grammar": "start: nowhere"}, "grammar: this grammar is not supported"),
        ({"json_schema": {"type": "nothing"}}, "json_schema: this schema is not supported"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": 3}, "json_schema is 3; allowed: an object"),
        ({"regex": ""}, "regex is ''; allowed"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar together"),
        ({"cancel": True}, "cancel is True; allowed: a threading.Event"),
        ({"progress": 5}, "progress is 5; allowed: a function"),
        ({"stop": 5}, "stop is 5; allowed: a text or a sequence of texts"),
        ({"temperature": 10**400}, "allowed: 0 (greedy) and more"),
        ({"logit_bias": {1: 10**400}}, "allowed: a finite number"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: this schema is not supported"),
        ({"regex": "[z-a]"}, "error: invalid character class range"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(model: Model, options: dict, text: str) -> None:
    with pytest.raises(OptionError, match=re.escape(text)) as raised:
        model.stream("the cat", **options)
    assert "\n" not in str(raised.value)


def test_forms_need_llguidance(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r"regex needs llguidance.*pip install 'tmac_py\[gramm"):
        model.generate("the cat", regex="a")


def test_processors_come_before_the_form(model: Model) -> None:
    """What a form forbids stays forbidden."""

    def only_seven(_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) == 7, np.float32(90), np.float32(0))

    answer = model.generate("the cat", logits_processor=only_seven, regex="(ab){3}")
    assert answer == "ababab"


def test_cancelled_before_the_first_token(model: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    assert list(model.stream("the cat", cancel=cancel)) == []
    answer = model.generate("the cat", cancel=cancel, seed=4)
    assert (answer, answer.ids, answer.finish_reason) == ("", (), "cancelled")
    assert vars(copy.deepcopy(answer)) == vars(answer)


@pytest.mark.parametrize("draft", ["lookup", "none", "model"])
def test_another_thread_cancels(model: Model, draft: str) -> None:
    """The part that came is the beginning of the whole answer, and the session goes on from it."""
    cancel, fifth = threading.Event(), threading.Event()
    calls = []

    def wait_at_fifth(_ids: np.ndarray, _logits: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 5:
            fifth.set()
            assert cancel.wait(60)

    options = {"seed": 2, "temperature": 1.0, "logit_bias": NO_END, "max_tokens": 100}
    source = model if draft == "model" else draft
    session = model.new_session()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            session.generate,
            "the cat",
            cancel=cancel,
            logits_processor=wait_at_fifth,
            draft=source,
            **options,
        )
        assert fifth.wait(60)
        cancel.set()
        result: Result = answer.result(60)
    whole = model.generate("the cat", draft="none", **options)
    n = len(result.ids)
    assert 5 <= n < 100
    assert result.ids == whole.ids[:n]
    assert result.finish_reason == "cancelled"
    prompt = model.check_prompt("the cat").tolist()
    assert session.ids == (*prompt, *whole.ids[: n - 1])


def test_cancelled_within_the_prompt(model: Model) -> None:
    prompt = (np.arange(4 * PREFILL_CHUNK) % 250 + 3).tolist()
    cancel = threading.Event()
    seen = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        if done == 2 * PREFILL_CHUNK:
            cancel.set()

    session = model.new_session()
    answer = session.generate(prompt, cancel=cancel, progress=progress)
    assert answer.finish_reason == "cancelled"
    assert seen == [PREFILL_CHUNK, 2 * PREFILL_CHUNK]
    assert session.ids == tuple(prompt[: 2 * PREFILL_CHUNK])
    again = session.generate(prompt, seed=1, max_tokens=5)
    assert again.timings.n_cached == 2 * PREFILL_CHUNK
    assert again.ids == model.generate(prompt, seed=1, max_tokens=5).ids


def test_an_interrupt_within_the_prompt_leaves_the_session_usable(model: Model) -> None:
    prompt = (np.arange(3 * PREFILL_CHUNK) % 250 + 3).tolist()

    def interrupted(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    session = model.new_session()
    with pytest.raises(KeyboardInterrupt):
        session.generate(prompt, progress=interrupted)
    assert len(session.ids) == PREFILL_CHUNK
    assert len(session.generate(prompt, max_tokens=2).ids) <= 2


def test_threads_share_a_model(model: Model) -> None:
    """Each gets what it gets alone, with forms, processors and chats among each other."""
    kinds = [
        {"seed": 1, "temperature": 1.0},
        {"regex": "[a-z ]{9}", "seed": 2},
        {"json_schema": {"enum": ["low", "high"]}, "seed": 3},
        {"logits_processor": lambda _ids, logits: -logits, "seed": 4, "draft": "none"},
    ]

    def work(i: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        options = kinds[i % len(kinds)]
        if i % 3 == 0:
            answer = model.chat(HELLO, max_tokens=20, **options)
        else:
            answer = model.generate(f"the cat {i}", max_tokens=20, **options)
        return answer.ids, answer.logprobs

    alone = [work(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(12))) == alone


def test_closing_a_model_ends_its_generations(model: Model) -> None:
    other = Model.load(model.path, threads=1)
    tokens = other.stream("the cat", logit_bias=NO_END)
    next(tokens)
    other.close()
    with pytest.raises(TmacError, match="the model is closed"):
        list(tokens)


def test_a_closed_model_says_so_of_a_chat(model: Model) -> None:
    other = Model.load(model.path, threads=1)
    other.close()
    with pytest.raises(TmacError, match="the model is closed"):
        other.chat(HELLO)
