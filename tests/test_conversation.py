"""Conversations: what a turn computes, what happens when the context is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_model
from tmac_py.conversation import Chat, Text, open_conversation
from tmac_py.errors import ContextError, ModelFileError, TmacError
from tmac_py.model import Model

GREEDY = {"temperature": 0.0, "max_tokens": 6}
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content[4:] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversation") / "tiny.lut"
    return tiny_model.write_tiny_model(path, max_position_embeddings=4096, eos_token_ids=())


@pytest.fixture(scope="module")
def model(lut: Path) -> Iterator[Model]:
    with Model.load(lut, threads=2) as model:
        yield model


def test_a_turn_answers_as_the_whole_prompt_does(model: Model) -> None:
    chat = Chat(model, system="be brief")
    for text in ("the cat", "sat on", "the mat"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        prompt = model.chat_prompt(messages)
        expected = model.generate(prompt, **GREEDY)
        tokens = list(chat.stream(text, **GREEDY))
        assert [token.id for token in tokens] == list(expected.ids)
        assert chat.messages == [*messages, {"role": "assistant", "content": str(expected)}]
    timings = tokens[-1].timings
    assert timings.n_prompt == len(prompt)
    assert timings.n_cached > len(prompt) - 40  # the last message and the marks around it


def test_a_template_that_strips_answers_keeps_what_is_common(lut: Path) -> None:
    with Model.load(lut, threads=1, chat_template=STRIPPING) as model:
        chat = Chat(model, variables={"opening": "well "})
        first = list(chat.stream("the cat", **GREEDY))
        assert model.tokenizer.decode(chat.session.ids).endswith(
            "".join(t.text for t in first[:-1])
        )
        prompt = model.chat_prompt(
            [*chat.messages, {"role": "user", "content": "more"}], opening="well "
        )
        expected = model.generate(prompt, **GREEDY)
        again = list(chat.stream("more", **GREEDY))
        assert [token.id for token in again] == list(expected.ids)
        assert 0 < again[-1].timings.n_cached < first[-1].n_prompt


def test_an_answer_that_is_closed_counts_as_far_as_it_came(model: Model) -> None:
    chat = Chat(model)
    stream = chat.stream("the cat", **GREEDY)
    first = next(stream).text + next(stream).text
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    chat.stream("not begun", **GREEDY).close()
    assert len(chat.messages) == 2


def test_oldest_turns_go_when_the_context_is_full(model: Model) -> None:
    chat = Chat(model, model.new_session(160), system="be brief")
    dropped = 0
    for i in range(12):
        list(chat.stream(f"message {i}", **GREEDY))
        dropped += chat.dropped
        assert chat.system == "be brief"
        assert chat.messages[1]["role"] == "user"
        assert chat.messages[-2]["content"] == f"message {i}"
    assert dropped == 12 - (len(chat.messages) - 1) // 2
    assert dropped > 0
    before = list(chat.messages)
    with pytest.raises(ContextError, match="the context holds 160"):
        chat.stream("x " * 200, **GREEDY)
    assert chat.messages == before


def test_a_full_context_shortens_a_text(model: Model) -> None:
    text = Text(model, model.new_session(64))
    list(text.stream("the cat sat", **GREEDY))
    dropped = 0
    for _ in range(8):
        list(text.stream("on the mat", **GREEDY))
        dropped += text.dropped
        assert len(text.session.ids) <= 64
    assert dropped > 0
    with pytest.raises(ContextError):
        text.stream("x " * 100, **GREEDY)


def test_saved_chats_go_on(model: Model, tmp_path: Path) -> None:
    chat = Chat(model, system="be brief")
    list(chat.stream("the cat", **GREEDY))
    chat.save(tmp_path / "chat")
    expected = [token.id for token in chat.stream("sat", **GREEDY)]
    other = Chat(model)
    other.load(tmp_path / "chat")
    tokens = list(other.stream("sat", **GREEDY))
    assert [token.id for token in tokens] == expected
    assert tokens[-1].timings.n_cached > 20
    assert other.messages == chat.messages
    with pytest.raises(ModelFileError, match="holds no text, only its tokens"):
        Text(model).load(tmp_path / "chat")
    session = model.new_session()
    session.save(tmp_path / "plain")
    with pytest.raises(ModelFileError, match="holds no chat"):
        other.load(tmp_path / "plain")
    assert other.messages[0]["content"] == "be brief"


def test_which_kind_of_conversation(model: Model, lut: Path, tmp_path: Path) -> None:
    assert isinstance(open_conversation(model), Chat)
    assert isinstance(open_conversation(model, raw=True), Text)
    base = tiny_model.write_tiny_model(tmp_path / "base.lut", chat=False)
    with Model.load(base, threads=1) as plain:
        assert isinstance(open_conversation(plain), Text)
        with pytest.raises(TmacError, match="this model has none"):
            open_conversation(plain, system="x")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with Model.load(lut, threads=1, chat_template=refusing) as strict:
        with pytest.raises(TmacError, match="no system"):
            Chat(strict, system="x")
        chat = Chat(strict)
        with pytest.raises(TmacError, match="no system"):
            chat.set_system("x")
        assert chat.system is None
