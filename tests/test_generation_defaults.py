"""generation_config.json: from the checkpoint into the .lut, and what it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_checkpoints import write_speaking
from tmac_py import Model
from tmac_py.cli.main import convert as program
from tmac_py.converters import convert
from tmac_py.lutfile import LutFile
from tmac_py.sampling import Sampler, SamplingParams


def model_with(tmp_path: Path, generation: dict[str, Any]) -> Path:
    folder = write_speaking(tmp_path / "m", num_hidden_layers=1)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    convert(folder, tmp_path / "m.lut")
    return tmp_path / "m.lut"


def params_of(lut: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> SamplingParams:
    """The parameters of a generation with these arguments."""
    seen: list[SamplingParams] = []
    init = Sampler.__init__

    def spy(self: Sampler, params: SamplingParams, *more: Any) -> None:
        seen.append(params)
        init(self, params, *more)

    monkeypatch.setattr(Sampler, "__init__", spy)
    with Model.load(lut, threads=1) as model:
        model.generate([1, 2, 3], max_tokens=2, seed=1, **arguments)
    return seen[0]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 2, "transformers_version": "4.40.0"}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 20, "min_p": 0, "temperature": None}, {"top_k": 20, "min_p": 0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1}, {"repeat_penalty": 1.1, "repeat_last_n": -1}),
        ({"repetition_penalty": 1.0}, {}),
    ],
)
def test_the_defaults_of_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generation: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    lut = model_with(tmp_path, generation)
    assert params_of(lut, monkeypatch) == SamplingParams(**expected, seed=1)


def test_what_the_user_says_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lut = model_with(tmp_path, {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1})
    given = {"temperature": 1.5, "repeat_penalty": 1.0, "repeat_last_n": 8, "top_k": 0}
    assert params_of(lut, monkeypatch, **given) == SamplingParams(**given, seed=1)


def test_greedy_by_default_if_the_model_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tmac_py.cli.main import run

    lut = model_with(tmp_path, {"do_sample": False})
    texts = []
    for more in (["--seed", "1"], ["--seed", "2"], ["--temp", "0"]):
        assert run([str(lut), "-p", "abc", "--raw", "-n", "8", "-q", "--json", *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] == texts[2]


def test_only_what_counts_is_kept(tmp_path: Path) -> None:
    lut = model_with(tmp_path, {"top_p": 0.9, "max_length": 4096, "bos_token_id": 1})
    with LutFile.open(lut) as file:
        assert json.loads(file.tokenizer["generation_config.json"]) == {"top_p": 0.9}
    with LutFile.open(model_with(tmp_path, {"max_length": 4096})) as file:
        assert "generation_config.json" not in file.tokenizer


@pytest.mark.parametrize(
    ("generation", "text"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
    ],
)
def test_values_that_are_not_allowed(
    tmp_path: Path, generation: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_speaking(tmp_path / "m", num_hidden_layers=1)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert program([str(folder), str(tmp_path / "m.lut"), "-q"]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: generation_config.json: {text}" in error
    assert error.count("\n") == 1
