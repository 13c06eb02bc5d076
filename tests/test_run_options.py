"""``tmac run`` with prompt caches, draft models, templates; completion scripts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import tiny_model
from tmac_py.cli import main as cli
from tmac_py.model import Model
from tmac_py.session import Session

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("options") / "tiny.lut"
    return str(tiny_model.write_tiny_model(path, max_position_embeddings=2048))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object, program: Callable[..., int] = cli.run) -> tuple[int, str, str]:
        try:
            status = program([str(arg) for arg in argv])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def ask(run: Run, lut: str) -> Callable[..., dict[str, Any]]:
    def call(*options: object, prompt: str = "the cat sat on the mat") -> dict[str, Any]:
        status, out, err = run(lut, "-p", prompt, "-n", 5, "--temp", 0, "--json", *options)
        assert status == 0, err
        answer: dict[str, Any] = json.loads(out)
        return answer

    return call


Ask = Callable[..., dict[str, Any]]


def held(lut: str, path: Path) -> list[int]:
    with Model.load(lut) as model:
        return list(Session.load(model, path).ids)


def test_prompt_cache(ask: Ask, lut: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    plain = ask()
    first = ask("--prompt-cache", path)
    assert (first["ids"], first["timings"]["n_cached"]) == (plain["ids"], 0)
    assert held(lut, path) == plain["prompt_ids"]
    again = ask("--prompt-cache", path, "--prompt-cache-ro")
    assert again["ids"] == plain["ids"]
    assert again["timings"]["n_cached"] == len(plain["prompt_ids"]) - 1
    before = path.read_bytes()
    ask("--prompt-cache", path, "--prompt-cache-ro", prompt="another")
    assert path.read_bytes() == before
    ask("--prompt-cache", path, "--prompt-cache-all")
    assert held(lut, path) == [*plain["prompt_ids"], *plain["ids"][:-1]]


def test_prompt_caches_that_cannot_be_used(run: Run, ask: Ask, lut: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    ask("--prompt-cache", path)
    other = tiny_model.write_tiny_model(tmp_path / "other.lut", seed=1)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes()[:-1])
    for options, text in (
        ((other, "--prompt-cache", path), f"{path}: saved with another model"),
        ((lut, "--prompt-cache", damaged), f"{damaged}: the file is damaged"),
        ((lut, "--prompt-cache", lut), "not a saved session"),
        ((lut, "--prompt-cache", path, "--kv", "int8"), "saved with kv f16"),
        ((lut, "--prompt-cache", tmp_path / "no" / "x"), "does not exist"),
        ((lut, "--prompt-cache", tmp_path / "x", "--prompt-cache-ro"), "no such file, and"),
        ((lut, "--prompt-cache-all"), "need --prompt-cache FILE"),
        ((lut, "--prompt-cache", path, "--prompt-cache-ro", "--prompt-cache-all"), "not go with"),
    ):
        status, out, err = run(*options, "-p", "x", "-n", 1)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert text in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "damaged", "other.lut"]


def test_guesses_change_no_text(run: Run, ask: Ask, lut: str, tmp_path: Path) -> None:
    plain = ask("-n", 40)["ids"]
    draft = tiny_model.write_tiny_model(tmp_path / "draft.lut", seed=3)
    for options in (["--spec", "none"], ["--spec", "lookup"], ["-md", draft], ["-md", lut]):
        assert ask("-n", 40, *options)["ids"] == plain
    status, _, err = run(lut, "-p", "x", "-md", draft, "--spec", "none")
    assert (status, "give one of them" in err) == (2, True)
    status, _, err = run(lut, "-p", "x", "-md", tmp_path / "none.lut")
    assert (status, "no such file" in err) == (2, True)


def test_templates_of_ones_own(run: Run, ask: Ask, lut: str, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ word }} {{ messages[0].content }}")
    found = ask("--chat-template-file", template, "--chat-template-kwargs", '{"word": "the"}')
    with Model.load(lut) as model:
        assert found["prompt_ids"] == model.tokenizer.encode("the the cat sat on the mat")
    template.write_text("{% for %}")
    for options, text in (
        (("--chat-template-file", template), "not valid jinja2, line 1"),
        (("--chat-template-file", tmp_path / "none"), "No such file"),
        (("--chat-template-kwargs", "{"), "is not JSON"),
        (("--chat-template-kwargs", "[]"), "is not a JSON object"),
        (("--chat-template-kwargs", '{"messages": 1}'), "'messages' is not a variable to choose"),
        (("--chat", "--json"), "it does not go with --chat"),
    ):
        status, out, err = run(lut, "-p", "x", *options)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert text in err


def test_threads_by_environment(run: Run, lut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMAC_THREADS", "1")
    with Model.load(lut) as model:
        assert model.threads == 1
    for value in ("0", "two", "9999"):
        monkeypatch.setenv("TMAC_THREADS", value)
        status, _, err = run(lut, "-p", "x")
        assert status == 2
        assert f"TMAC_THREADS is {value!r}; allowed: 1 to 1024" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(run: Run, shell: str) -> None:
    status, script, err = run("completion", shell, program=cli.main)
    assert (status, err) == (0, "")
    for word in ("run", "convert", "prompt-cache", "chat-template-file", "group-size", "fish"):
        assert word in script
    assert run("completion", "csh", program=cli.main)[0] == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_its_shell(run: Run, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = run("completion", shell, program=cli.main)[1]
    done = subprocess.run(
        [shell, "-n"], input=script, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["tmac run", "tmac-run"])
def test_bash_completes(run: Run, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [EntryPoint(f"tmac-{c.name}", "", "console_scripts") for c in cli.COMMANDS]
    monkeypatch.setattr("tmac_py.cli.completion.entry_points", lambda **_: installed)
    script = run("completion", "bash", program=cli.main)[1]
    ask = f"""
COMP_WORDS=({words} --prompt-cache-); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
function=$(complete -p {words.split()[0]} | grep -o '_shtab_[a-z_]*')
$function {words.split()[0]} --prompt-cache- {words.split()[-1]}
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script + ask], capture_output=True, text=True, timeout=60, check=False
    )
    assert sorted(done.stdout.split()) == ["--prompt-cache-all", "--prompt-cache-ro"], done.stderr
