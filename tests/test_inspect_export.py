"""``tmac inspect --export``: metadata, tokenizer and tensors as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tiny_model import write_tiny_model
from tmac_py.cli.diff import float_rows
from tmac_py.cli.main import inspect
from tmac_py.lutfile import LutFile

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("export") / "tiny.lut")


def test_a_folder_holds_what_was_asked_for(
    lut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tensors = ["--tensor", Q, "--tensor", "*.input_layernorm.weight"]
    assert inspect([str(lut), "--export", str(out), *tensors]) == 0
    names = capsys.readouterr().out.split()
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert inspect([str(lut), "--tensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert json.loads((out / "tmac.json").read_text()) == facts
    with LutFile.open(lut) as file:
        for name, content in file.tokenizer.items():
            assert (out / name).read_bytes() == content
        array = np.load(out / f"{Q}.npy")
        assert array.dtype == np.float32
        assert array.shape == file.tensors[Q].shape
        assert np.array_equal(array, np.concatenate(list(float_rows(file, file.tensors[Q]))))
        for layer in (0, 1):
            name = f"model.layers.{layer}.input_layernorm.weight"
            assert np.array_equal(np.load(out / f"{name}.npy"), file.float(name))
    assert len(list(out.glob("*.npy"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(lut: Path, tmp_path: Path) -> None:
    assert inspect([str(lut), "--export", str(tmp_path / "a"), "--json"]) == 0
    (tmp_path / "b").mkdir()
    assert inspect([str(lut), "--export", str(tmp_path / "b")]) == 0
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--export", "full"], "full: exists; --export needs a new folder"),
        (["--export", "file"], "file: exists; --export needs a new folder"),
        (["--export", "new", "--tensor", "*.nothing"], "is named '*.nothing'; --tensors lists"),
        (["--export", "new/deep"], "new does not exist"),
        (["--tensor", "x"], "--tensor needs --export"),
        (["--export", "new", "--diff", "x"], "do not go together"),
    ],
)
def test_what_it_refuses(
    lut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert inspect([str(lut), *arguments]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
