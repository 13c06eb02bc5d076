"""tmac-convert --verify: equal files pass, any other bit is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from checkpoint_families import FAMILIES, UP
from tiny_checkpoints import write_speaking
from tmac_py.cli.main import convert as program
from tmac_py.lutfile import LutFile

DENSE = ("dense", "fp8", "lora")


def alter(path: Path, name: str, offset: int) -> None:
    """Flip a bit of a tensor of a .lut file, and make its checksums right again."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    begin, end = header[name]["data_offsets"]
    data[start + begin + offset % (end - begin)] ^= 1
    checksum = xxhash.xxh3_128_hexdigest(bytes(data[start + begin : start + end]))
    metadata = header["__metadata__"]
    old = json.loads(metadata["tmac.tensors"])[name]["xxh3"]
    text = bytes(data[8:start])
    at = text.index(old.encode(), text.index(f'\\"{name}\\":'.encode()))
    text = text[:at] + checksum.encode() + text[at + len(old) :]
    blank = text.replace(metadata["tmac.header"].encode(), b"0" * 32)
    data[8:start] = blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode())
    path.write_bytes(data)
    LutFile.open(path).close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_flipped_bit_is_found_and_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FAMILIES[name].build(tmp_path), "-o", str(tmp_path / "m.lut"), "--verify"]
    assert program(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{tmp_path / 'm.lut'}: equal to {arguments[0]}")
    with LutFile.open(tmp_path / "m.lut") as file:
        tensors = list(file.tensors.values())
    whole = (tmp_path / "m.lut").read_bytes()
    found = "byte" if name in DENSE else "code|scale|offset"
    for tensor in tensors:
        (tmp_path / "m.lut").write_bytes(whole)
        alter(tmp_path / "m.lut", tensor.name, offset=3)
        altered = (tmp_path / "m.lut").read_bytes()
        assert program([*arguments, "-q"]) == 2, tensor.name
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"m.lut differs in {tensor.name.replace('.order', '.weight')} (" in error
        if tensor.name.startswith(UP) and tensor.kind == "linear":
            assert any(f"{tensor.name} ({word}" in error for word in found.split("|"))
        assert (tmp_path / "m.lut").read_bytes() == altered


@pytest.mark.parametrize("arguments", [["--quant", "gptq", "--bits", "3"], ["--quant", "awq"]])
def test_calibrated_files_are_made_anew(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_speaking(tmp_path / "m", num_hidden_layers=1)
    given = [str(folder), str(tmp_path / "m.lut"), "--calibration-tokens", "256", *arguments]
    assert program([*given, "--verify"]) == 0
    capsys.readouterr()
    alter(tmp_path / "m.lut", "model.layers.0.mlp.down_proj.weight", 1000)
    assert program([*given, "--verify"]) == 2
    assert "model.layers.0.mlp.down_proj.weight (byte 1000 of" in capsys.readouterr().err


def change_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))


def change_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        (change_config, [], "config rope_theta (10000.0 instead of 500000.0)"),
        (change_template, [], "tokenizer/chat_template.jinja (missing)"),
        (None, ["--bits", "3"], "q_proj.weight (bits 4 instead of 3)"),
        (None, ["--quant", "rtn"], "source quantised ('mse group_size=32' instead of 'rtn"),
    ],
)
def test_other_settings_are_named(
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    arguments: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_speaking(tmp_path / "m", num_hidden_layers=1)
    given = [str(folder), str(tmp_path / "m.lut"), "-q"]
    assert program(given) == 0
    if change is not None:
        change(folder)
    assert program([*given, "--verify", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_with_force_the_file_is_made_anew(tmp_path: Path) -> None:
    arguments = [*FAMILIES["gptq"].build(tmp_path), str(tmp_path / "m.lut"), "-q"]
    assert program(arguments) == 0
    whole = (tmp_path / "m.lut").read_bytes()
    alter(tmp_path / "m.lut", f"{UP}.weight", 0)
    assert program(arguments) == 2
    assert program([*arguments, "--verify", "--force"]) == 0
    assert (tmp_path / "m.lut").read_bytes() == whole
