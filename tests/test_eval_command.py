"""tmac eval: reports, references, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_model as tiny
from test_evaluation import milder
from tmac_py import evaluation, multiple_choice
from tmac_py.cli.main import evaluate
from tmac_py.evaluation import ChunkScores

TEXT = "the cat sat on the mat. Hello world, low-bit models on the CPU! " * 12
CHOICES = [
    {"question": f"the cat number {i} sat on", "choices": ["the mat", "the CPU", "x"], "answer": 1}
    for i in range(6)
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    tiny.write_tiny_model(folder / "a.lut", change=milder)
    tiny.write_tiny_model(folder / "b.lut", bits=2, change=milder)
    (folder / "text.txt").write_text(TEXT + "\n")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = evaluate([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def result_of(run: Run, *arguments: object) -> dict[str, Any]:
    status, out, err = run(*arguments, "--json", "-q", "-t", 1)
    assert (status, err) == (0, "")
    return dict(json.loads(out))


def text_arguments(folder: Path) -> list[object]:
    return [folder / "b.lut", "-f", folder / "text.txt", "-c", 32]


def choice_arguments(folder: Path) -> list[object]:
    arguments = [folder / "b.lut", "--multiple-choice", folder / "questions.jsonl"]
    return [*arguments, "--reference", folder / "a.lut"]


def test_perplexity_is_printed_as_llama_perplexity_does(folder: Path, run: Run) -> None:
    status, out, err = run(*text_arguments(folder))
    assert status == 0
    found = re.fullmatch(r"Final estimate: PPL = (\d+\.\d{4}) \+/- (\d+\.\d{5})\n", out)
    assert found
    running = re.fullmatch(r"(\[\d+\]\d+\.\d{4},)+\n", err)
    assert running
    result = result_of(run, *text_arguments(folder))
    assert float(found[1]) == pytest.approx(result["ppl"]["value"], abs=1e-4)
    assert float(err.strip().rstrip(",").split("]")[-1]) == pytest.approx(float(found[1]))
    assert result["chunks"] == err.count("[")
    assert result["tokens"] == result["chunks"] * 15
    assert (result["tables"], result["kv"], result["n_ctx"]) == ("int8", "f16", 32)
    assert result["divergence"] is None
    assert run(*text_arguments(folder), "-q")[2] == ""


def test_options_change_what_is_measured(folder: Path, run: Run) -> None:
    plain = result_of(run, *text_arguments(folder))
    for option in (["--kv", "int4"], ["--tables", "exact"], ["--ppl-stride", 16], ["-ub", "256"]):
        changed = result_of(run, *text_arguments(folder), *option)
        assert (changed["ppl"] == plain["ppl"]) == (option[0] == "-ub")
    assert result_of(run, *text_arguments(folder), "--chunks", 2)["chunks"] == 2


def test_a_reference_and_its_stored_log_probabilities_agree(
    folder: Path, run: Run, tmp_path: Path
) -> None:
    arguments = text_arguments(folder)
    live = result_of(run, *arguments, "--reference", folder / "a.lut", "-ub", 16)
    base = tmp_path / "base.logits"
    own = result_of(run, folder / "a.lut", *arguments[1:], "-ub", 16, "--save-logits", base)
    assert live["divergence"]["base_ppl"] == own["ppl"]
    for text in (["-f", folder / "text.txt"], []):
        stored = result_of(run, folder / "b.lut", *text, "--kl-base", base, "-ub", 16)
        assert stored["ppl"] == live["ppl"]
        assert (stored["reference"], stored["reference_tables"]) == ("a.lut", "int8")
        for name in ("kld", "delta_p", "base_ppl"):
            want = live["divergence"][name]["value"]
            assert stored["divergence"][name]["value"] == pytest.approx(want, rel=5e-3)
    status, out, _ = run(folder / "b.lut", "--kl-base", base)
    assert status == 0
    for label in ("Mean KLD", "Median KLD", "99.0% KLD", "RMS Δp", "Same top p", "Final estimate"):
        assert label in out
    assert list(tmp_path.iterdir()) == [base]


def test_tables_can_be_compared_in_one_model(folder: Path, run: Run) -> None:
    arguments = [*text_arguments(folder), "--reference", folder / "b.lut"]
    assert result_of(run, *arguments)["divergence"]["kld"]["value"] == 0
    changed = result_of(run, *arguments, "--reference-tables", "exact")
    assert 0 < changed["divergence"]["kld"]["value"] < 0.1
    assert changed["reference_tables"] == "exact"


def test_flips(folder: Path, run: Run) -> None:
    result = result_of(run, *choice_arguments(folder))
    assert result["questions"] == len(CHOICES)
    flips = result["flips"]
    total = flips["to_correct"] + flips["to_incorrect"]
    assert flips["flips"]["value"] == pytest.approx(total)
    change = flips["to_correct"] - flips["to_incorrect"]
    assert result["acc"]["value"] - flips["base_acc"]["value"] == pytest.approx(change)
    status, out, err = run(*choice_arguments(folder))
    assert status == 0
    assert f"Flips                     : {100 * total:10.2f}" in out
    assert err.count("[") == len(CHOICES)
    itself = [folder / "b.lut", "--multiple-choice", folder / "questions.jsonl"]
    same = result_of(run, *itself, "--reference", folder / "b.lut")
    assert same["flips"]["changed"]["value"] == 0
    assert same["flips"]["base_acc"] == result["acc"]
    assert result_of(run, *itself)["flips"] is None


@pytest.mark.parametrize("kind", ["text", "choices"])
def test_a_stopped_evaluation_goes_on(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    state = tmp_path / "state.jsonl"
    saved, whole = tmp_path / "saved.logits", tmp_path / "whole.logits"
    if kind == "text":
        arguments, extra = text_arguments(folder), ["--save-logits", saved]
        want = result_of(run, *arguments, "--save-logits", whole)
    else:
        arguments, extra = choice_arguments(folder), []
        want = result_of(run, *arguments)
    total = want["chunks"] if kind == "text" else want["questions"]

    def stop_after(n: int, patch: pytest.MonkeyPatch) -> None:
        done = 0

        def count(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal done
                if done == n:
                    raise KeyboardInterrupt
                done += 1
                return original(*args, **options)

            return wrapped

        patch.setattr(evaluation, "score_chunk", count(evaluation.score_chunk))
        score = multiple_choice.ChoiceScorer.score
        patch.setattr(multiple_choice.ChoiceScorer, "score", count(score))

    for stop in (0, 2):
        with monkeypatch.context() as patch:
            stop_after(stop, patch)
            status, out, err = run(*arguments, *extra, "--resume", state, "-t", 1)
            assert (status, out) == (130, "")
            assert f" of {total} " in err.splitlines()[-1]
            assert "the same command goes on" in err
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + (2 if kind == "text" else 1)  # a question asks two models
    state.write_bytes(b"".join(lines) + b'{"nll": [1.0, 2.')  # killed while it wrote
    assert saved.exists() is False
    assert result_of(run, *arguments, *extra, "--resume", state) == want
    assert len(state.read_bytes().splitlines()) == 1 + total
    if kind == "text":
        assert saved.read_bytes() == whole.read_bytes()
        assert not list(tmp_path.glob("*.part"))
    # Nothing is left to do: the result comes from the state alone.
    stop_after(0, monkeypatch)
    assert result_of(run, *arguments, *extra, "--resume", state) == want


def test_without_a_state_nothing_is_left(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> ChunkScores:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "score_chunk", stop)
    status, _, err = run(*text_arguments(folder), "--save-logits", tmp_path / "x.logits")
    assert status == 130
    assert "stopped after 0 of" in err
    assert "goes on" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_state_belongs_to_one_evaluation(folder: Path, run: Run, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    result_of(run, *text_arguments(folder), "--resume", state)
    content = state.read_bytes()
    for changed, names in (
        ([*text_arguments(folder), "--tables", "exact"], "differs in tables;"),
        ([folder / "a.lut", "-f", folder / "text.txt", "-c", 32], "differs in model;"),
        ([*text_arguments(folder), "--reference", folder / "a.lut"], "differs in reference;"),
        (choice_arguments(folder), "differs in kind, "),
    ):
        status, _, err = run(*changed, "--resume", state)
        assert (status, err.count("\n")) == (2, 1)
        assert names in err
        assert state.read_bytes() == content
    lines = content.splitlines(keepends=True)
    for damaged, text in (
        (b"some notes\n", "not a state file"),
        (b"{x", "not a state file"),
        (b"".join([lines[0], b"{}\n", *lines[2:]]), "line 2 is damaged"),
        (b"".join([*lines[:2], lines[2].replace(b"[", b"[1.0, ", 1)]), "line 3 is damaged"),
        (content + lines[-1], f"line {len(lines) + 1} is damaged"),
    ):
        state.write_bytes(damaged)
        status, _, err = run(*text_arguments(folder), "--resume", state)
        assert (status, err.count("\n")) == (2, 1)
        assert text in err
        assert state.read_bytes() == damaged


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to evaluate on"),
        (["-f", "{folder}/none.txt"], "none.txt: No such file"),
        (["-f", "{folder}/a.lut"], "a.lut: not UTF-8 text"),
        (["-f", "{folder}/text.txt", "-c", "3"], "a whole number from 4 up"),
        (["-f", "{folder}/text.txt", "-c", "97"], "chunks of 97 tokens do not fit"),
        (["-f", "{folder}/text.txt"], "chunks of 512 need 1024 or more"),
        (["-f", "{folder}/text.txt", "-c", "32", "--ppl-stride", "33"], "allowed: 0 (none) to 32"),
        (["-f", "{folder}/text.txt", "-c", "32", "--kv", "int5"], "kv is 'int5'"),
        (["-f", "{folder}/text.txt", "-c", "32", "--kl-base", "{folder}/a.lut"], "not a file of"),
        (["-f", "{folder}/text.txt", "--reference-tables", "exact"], "needs --reference"),
        (["-f", "{folder}/text.txt", "--multiple-choice", "x"], "not allowed with"),
        (["--multiple-choice", "{folder}/questions.jsonl", "-c", "64"], "-c is for texts"),
        (["--multiple-choice", "{folder}/text.txt"], "text.txt: line 1: "),
        (["--multiple-choice", "{folder}/questions.jsonl", "--save-logits", "x"], "is for texts"),
        (["-f", "{folder}/text.txt", "-c", "32", "--reference", "{folder}/no.lut"], "no such file"),
        (
            ["-f", "{folder}/text.txt", "-c", "32", "--save-logits", "{folder}/none/x"],
            "No such file or directory",
        ),
    ],
)
def test_what_it_refuses(folder: Path, run: Run, arguments: list[str], text: str) -> None:
    before = sorted(folder.iterdir())
    status, out, err = run(folder / "a.lut", *(a.format(folder=folder) for a in arguments))
    assert (status, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_references_that_do_not_fit(folder: Path, run: Run, tmp_path: Path) -> None:
    small = tiny.write_tiny_model(tmp_path / "small.lut", vocab_size=310)
    arguments = text_arguments(folder)
    status, _, err = run(*arguments, "--reference", small)
    assert (status, err.count("\n")) == (2, 1)
    assert "a vocabulary of 310 tokens, the model has 320" in err
    base = tmp_path / "base.logits"
    result_of(run, small, *arguments[1:], "--save-logits", base)
    assert "a vocabulary of 310" in run(folder / "a.lut", "--kl-base", base)[2]
    result_of(run, folder / "a.lut", *arguments[1:], "--save-logits", base)
    assert "-c is 40, and " in run(folder / "a.lut", "--kl-base", base, "-c", 40)[2]
    (tmp_path / "other.txt").write_text(TEXT[1:])
    status, _, err = run(folder / "a.lut", "-f", tmp_path / "other.txt", "--kl-base", base)
    assert (status, err.count("\n")) == (2, 1)
    assert "made of another text" in err


def test_help(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "examples:\n  tmac-eval model.lut -f text.txt" in out
