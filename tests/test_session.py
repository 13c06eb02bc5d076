"""Sessions: what is held is not computed again; fork, save and load go on with the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py.errors import ContextError, ModelFileError, OptionError, TmacError
from tmac_py.model import Model
from tmac_py.session import Session
from tmac_py.sessionfile import write_session

PROMPT = np.random.default_rng(8).integers(3, tiny.VOCAB, 14).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.write_tiny_model(tmp_path_factory.mktemp("session") / "tiny.lut")
    with Model.load(path, threads=2) as model:
        yield model


def answer(model: Model | Session, prompt: list[int], n: int = 6) -> list[int]:
    return list(model.generate(prompt, max_tokens=n, temperature=0, logit_bias={2: -np.inf}).ids)


def computed(session: Session, prompt: list[int]) -> int:
    """How many tokens of the prompt the session had to compute."""
    timings = session.generate(prompt, max_tokens=1, seed=0).timings
    assert timings.n_prompt == len(prompt)
    return timings.n_prompt - timings.n_cached


def test_a_longer_text_goes_on_where_the_last_one_ended(model: Model) -> None:
    session = model.new_session()
    first = answer(session, PROMPT)
    assert first == answer(model, PROMPT)
    assert session.ids == (*PROMPT, *first[:-1])
    text = [*PROMPT, *first, 7, 8]
    assert computed(session, text) == 3
    session.truncate(len(PROMPT) + 2)
    assert computed(session, text) == 6
    assert answer(session, text) == answer(model, text)


def test_another_text_keeps_the_common_beginning(model: Model) -> None:
    session = model.new_session()
    answer(session, PROMPT)
    other = [*PROMPT[:9], 5, 5, 5]
    assert computed(session, other) == 3
    assert session.ids == tuple(other)
    assert answer(session, other) == answer(model, other)
    assert computed(session, other) == 1
    assert computed(session, PROMPT[:4]) == 1
    assert session.ids == tuple(PROMPT[:4])


def test_forks_go_on_apart(model: Model) -> None:
    session = model.new_session(60)
    answer(session, PROMPT)
    fork = session.fork()
    assert fork.ids == session.ids
    assert fork.n_ctx == 60
    one, other = [*PROMPT, 9, 9], [*PROMPT, 4]
    assert (answer(fork, one), answer(session, other)) == (answer(model, one), answer(model, other))
    assert computed(fork, one) == 1
    assert computed(session, other) == 1


@pytest.mark.parametrize("kv", ["f16", "int8", "int4", "int8/int4"])
def test_a_saved_session_goes_on_with_the_same_bits(model: Model, tmp_path: Path, kv: str) -> None:
    session = model.new_session(kv=kv)
    first = answer(session, PROMPT)
    path = tmp_path / "session"
    session.save(path)
    text = [*PROMPT, *first, 7]
    expected = answer(session, text, 20)
    loaded = Session.load(model, path, kv=kv)
    assert loaded.ids == (*PROMPT, *first[:-1])
    assert computed(loaded, text) == 2
    assert answer(loaded, text, 20) == expected
    assert answer(Session.load(model, path, n_ctx=80), text, 20) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["session"]


def test_a_closed_stream_leaves_what_was_said(model: Model) -> None:
    whole = answer(model, PROMPT, 12)
    for draft in ("none", "lookup"):
        session = model.new_session()
        stream = session.stream(
            PROMPT, temperature=0, logit_bias={2: -np.inf}, draft=draft, max_tokens=50
        )
        for _ in range(5):
            next(stream)
        with pytest.raises(TmacError, match="in use: an answer is under way"):
            session.fork()
        with pytest.raises(TmacError, match="in use"):
            session.generate(PROMPT)
        stream.close()
        assert session.ids == (*PROMPT, *whole[:4])
        assert answer(session, PROMPT, 12) == whole


def test_an_interrupt_in_the_prompt_keeps_what_was_computed(model: Model) -> None:
    session = model.new_session()

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, progress=interrupt)
    assert session.ids == tuple(PROMPT)
    assert computed(session, PROMPT) == 1


@pytest.mark.parametrize("draft", ["model", "lookup", "none"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_drafts_change_no_text(model: Model, draft: str, temperature: float) -> None:
    chosen = model if draft == "model" else draft
    options = {"temperature": temperature, "seed": 4, "max_tokens": 60}
    expected = model.generate(PROMPT, **options, draft="none")
    found = model.generate(PROMPT, **options, draft=chosen)
    assert (found.ids, found.logprobs) == (expected.ids, expected.logprobs)


def test_options_are_checked(model: Model, tmp_path: Path) -> None:
    session = model.new_session(20)
    with pytest.raises(TypeError, match="'temprature'"):
        session.generate(PROMPT, temprature=1)
    with pytest.raises(OptionError, match="draft is 'big'; allowed: 'lookup', 'none', or a Model"):
        session.generate(PROMPT, draft="big")
    with pytest.raises(ContextError, match="30 tokens, the context holds 20"):
        session.generate([5] * 30)
    with pytest.raises(OptionError, match="n is 5; allowed: 0"):
        session.truncate(5)
    path = tiny.write_tiny_model(tmp_path / "other.lut", seed=1)
    answer(session, PROMPT)
    session.save(tmp_path / "saved")
    with Model.load(path, threads=1) as other, pytest.raises(ModelFileError, match="another model"):
        Session.load(other, tmp_path / "saved")
    with pytest.raises(ContextError, match="holds 19 tokens, the context has room for 10"):
        Session.load(model, tmp_path / "saved", n_ctx=10)
    with pytest.raises(OptionError, match="saved with kv f16"):
        Session.load(model, tmp_path / "saved", kv="int8")


def test_what_is_no_saved_session(model: Model, tmp_path: Path) -> None:
    session = model.new_session()
    answer(session, PROMPT)
    path = tmp_path / "session"
    session.save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["ids"]["shape"] == [len(session.ids)]  # any safetensors reader opens it
    for damaged in (content[:-1], content + b"x", content[:-9] + b"y" + content[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match="damaged"):
            Session.load(model, path)
    nested = (9000).to_bytes(8, "little") + b"[" * 9000
    for other in (b"", b"abc", b"\xff" * 100, (5).to_bytes(8, "little") + b"[1,2]", nested):
        path.write_bytes(other)
        with pytest.raises(ModelFileError, match="not a saved session"):
            Session.load(model, path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        Session.load(model, tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        session.save(tmp_path / "nowhere" / "session")
    assert caught.value.filename == str(tmp_path / "nowhere" / "session")


def test_headers_that_do_not_fit_what_follows(model: Model, tmp_path: Path) -> None:
    """The checksum is that of the data alone."""
    session = model.new_session()
    answer(session, PROMPT)
    path = tmp_path / "session"
    n = len(session.ids)
    session.save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")

    def end_at(part: str, end: object) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        header[part]["data_offsets"][1] = end
        return header

    def with_metadata(name: str, value: str) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        header["__metadata__"][name] = value
        return header

    for header, message in (
        (with_metadata("format", "tmac-session-1"), "'tmac-session-1'; allowed: 'tmac-session-2'"),
        (with_metadata("kv", "int8"), "keys of 16 bits and values of 16, this cache 8 and 8"),
        (end_at("ids", 4 * n - 4), "not the state of a KV cache"),
        (end_at("ids", 4 * n - 1), "not a saved session"),
        (end_at("ids", -4), "not a saved session"),
        (end_at("ids", 4.0 * n), "not a saved session"),
        (end_at("state", 4 * n + 63), "at least 64 bytes, not 63"),
    ):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(ModelFileError, match=message):
            Session.load(model, path)
    state = session._cache.state()
    write_session(path, model.file.fingerprint, "f16", np.arange(n - 1, dtype=np.int32), state)
    with pytest.raises(ModelFileError, match=f"{n - 1} tokens with the state of {n}"):
        Session.load(model, path)
