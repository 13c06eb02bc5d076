"""The chat in a terminal: several lines, history, commands, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_model
from terminal import Terminal
from tmac_py.model import Model
from tmac_py.session import Session

Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose answers never end by themselves; token 77 has a text of its own."""
    path = tmp_path_factory.mktemp("chat") / "tiny.lut"
    return str(tiny_model.write_tiny_model(path, max_position_embeddings=65536, eos_token_ids=()))


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "history"
    monkeypatch.setenv("TMAC_HISTORY", str(path))
    return path


def note_of(lut: str, path: Path) -> dict[str, Messages]:
    with Model.load(lut) as model:
        note: dict[str, Messages] = json.loads(Session.load(model, path).note)
    return note


def said(lut: str, path: Path) -> list[str]:
    """What the user said in a saved chat."""
    return [m["content"] for m in note_of(lut, path)["messages"] if m["role"] == "user"]


def test_a_chat_from_hello_to_ctrl_d(lut: str, history: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    terminal = Terminal("run", lut, "-n", "4", "--temp", "0", "-c", "2048")
    banner = terminal.wait(">>> ")
    assert f"{lut} · " in banner
    assert "context of 2048 tokens" in banner
    assert "[cut off: as long as -n allows]" in terminal.send("the cat")
    terminal.type("first\\\r")
    terminal.wait(r"\.\.\. ")
    terminal.send("second")
    terminal.type('"""one\r')
    terminal.wait(r"\.\.\. ")
    terminal.type("\r")
    terminal.wait(r"\.\.\. ")
    terminal.send('three"""')
    terminal.send("")
    terminal.send(" /not a command")
    assert terminal.send("/nothing here").splitlines() == [
        "/nothing: no such command; there are: /reset /system /save /load /stats /help /exit"
    ]
    for command in ("/reset", "/system TEXT", "/save FILE", "/load FILE", "/stats", "/exit"):
        assert command in terminal.send("/help")
    stats = terminal.send("/stats")
    assert " known ones, " in stats
    assert "decode 4 tokens" in stats
    assert " of 2048 tokens" in stats
    assert terminal.send(f"/save {saved}") == f"[saved to {saved}]\r\n"
    terminal.type("\x04")
    assert terminal.end() == 0
    assert said(lut, saved) == ["the cat", "first\nsecond", "one\n\nthree", " /not a command"]
    kept = history.read_text().splitlines()
    assert kept[:4] == ["the cat", "first\\", "second", '"""one']
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_history_comes_back_with_the_arrow_key(lut: str, history: Path, tmp_path: Path) -> None:
    history.parent.mkdir()
    history.write_text("asked before\n")
    terminal = Terminal("run", lut, "-n", "2", "-q", TERM="xterm")
    terminal.wait(">>> ")
    terminal.type("\x1b[A")
    terminal.wait("asked before")
    terminal.send("")
    terminal.send(f"/save {tmp_path / 'saved'}")
    terminal.type("/exit\r")
    assert terminal.end() == 0
    assert said(lut, tmp_path / "saved") == ["asked before"]


@pytest.mark.usefixtures("history")
def test_ctrl_c_stops_an_answer_and_then_leaves(lut: str, tmp_path: Path) -> None:
    terminal = Terminal("run", lut, "-c", "60000", "-l", "77+1000")
    terminal.wait(">>> ")
    terminal.type("talk\r")
    terminal.wait(r"talk\r\n[^\r]{20}")
    terminal.interrupt()
    assert terminal.wait(">>> ").count("[stopped]") == 1
    assert terminal.send(f"/save {tmp_path / 'saved'}").startswith("[saved")
    user, answer = note_of(lut, tmp_path / "saved")["messages"]
    assert user == {"role": "user", "content": "talk"}
    assert len(answer["content"]) >= 20
    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.interrupt()
    assert "leaves" not in terminal.wait(">>> ")
    terminal.interrupt()
    assert "Ctrl-C again, Ctrl-D or /exit leaves" in terminal.wait(">>> ")
    terminal.interrupt()
    assert terminal.end() == 130
    assert "Traceback" not in terminal.output


@pytest.mark.usefixtures("history")
def test_a_second_ctrl_c_after_an_answer_leaves(lut: str) -> None:
    terminal = Terminal("run", lut, "-c", "60000", "-l", "77+1000", "-q")
    terminal.wait(">>> ")
    terminal.type("talk\r")
    terminal.wait(r"talk\r\n[^\r]{5}")
    terminal.interrupt()
    terminal.wait(">>> ")
    terminal.interrupt()
    assert terminal.end() == 130


@pytest.mark.usefixtures("history")
def test_save_load_reset_and_system(lut: str, tmp_path: Path) -> None:
    saved, again = tmp_path / "saved", tmp_path / "again"
    terminal = Terminal("run", lut, "-n", "3", "--temp", "0", "--system", "be brief")
    terminal.wait(">>> ")
    assert terminal.send("/system") == "be brief\r\n"
    terminal.send("one")
    terminal.send(f"/save {saved}")
    terminal.send("/reset")
    assert terminal.send("/system be loud") == "[system message set]\r\n"
    terminal.send("two")
    terminal.send(f"/save {again}")
    assert " tokens loaded from " in terminal.send(f"/load {saved}")
    assert terminal.send("/system") == "be brief\r\n"
    terminal.send("three")
    assert "prefill" in terminal.send("/stats")
    for line, reason in (
        ("/load", "the name of a file is needed: /load FILE"),
        (f"/load {tmp_path / 'none'}", "cannot be read: No such file"),
        (f"/load {lut}", "not a saved session"),
        (f"/save {tmp_path / 'no' / 'where'}", "No such file or directory"),
    ):
        answer = terminal.send(line)
        assert answer.startswith("error: ")
        assert reason in answer
        assert answer.count("\n") == 1
    terminal.send(f"/save {saved}")
    terminal.type("/exit\r")
    assert terminal.end() == 0
    assert said(lut, saved) == ["one", "three"]
    messages = note_of(lut, again)["messages"]
    assert messages[0] == {"role": "system", "content": "be loud"}
    assert said(lut, again) == ["two"]


@pytest.mark.usefixtures("history")
def test_a_single_turn(lut: str) -> None:
    terminal = Terminal("run", lut, "-st", "-n", "3")
    terminal.wait(">>> ")
    terminal.type("hello\r")
    assert terminal.end() == 0
    assert terminal.output.count(">>> ") == 1


@pytest.mark.usefixtures("history")
def test_without_a_template_text_is_continued(tmp_path: Path) -> None:
    base = str(tiny_model.write_tiny_model(tmp_path / "base.lut", chat=False))
    terminal = Terminal("run", base, "-n", "3", "--temp", "0")
    assert "without a chat template: what you type is continued" in terminal.wait(">>> ")
    terminal.send("the cat")
    assert "error: a system message needs a chat template" in terminal.send("/system x")
    terminal.send("sat")
    terminal.send(f"/save {tmp_path / 'saved'}")
    terminal.type("\x04")
    assert terminal.end() == 0
    text = note_of(base, tmp_path / "saved")["text"]
    assert isinstance(text, str)
    assert text.startswith("the cat")
    assert "\nsat" in text


@pytest.mark.usefixtures("history")
def test_a_message_that_does_not_fit_and_turns_that_do_not(lut: str) -> None:
    terminal = Terminal("run", lut, "-c", "96", "-n", "12", "--temp", "0")
    terminal.wait(">>> ")
    answer = terminal.send("x y " * 60)
    assert answer.strip().startswith("error: the prompt has ")
    dropped = [terminal.send("hello there") for _ in range(6)]
    assert any("[context full: the oldest " in text for text in dropped)
    assert not any("error" in text for text in dropped)
    terminal.type("\x04")
    assert terminal.end() == 0


def piped(lut: str, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tmac_py", "run", lut, "-n", "3", "--temp", "0", *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def test_lines_of_standard_input_are_messages_of_a_forced_chat(lut: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    lines = f'one\n"""two\nlines"""\n/save {saved}\n'
    done = piped(lut, lines, "--chat", "-p", "zero", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert ">>>" not in done.stdout
    assert said(lut, saved) == ["zero", "one", "two\nlines"]
    once = piped(lut, "not read\n", "-cnv", "-st", "-p", "zero", "-q", "-s", "0")
    assert (once.returncode, once.stderr) == (0, "")
    assert done.stdout.startswith(once.stdout)
    assert len(done.stdout) > len(once.stdout)


def test_without_a_terminal_nothing_is_a_chat(lut: str) -> None:
    done = piped(lut, "one\ntwo\n")
    assert done.returncode == 0
    assert "tok/s" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert piped(lut, "").returncode == 2
