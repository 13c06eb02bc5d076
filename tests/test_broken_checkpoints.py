"""Broken checkpoints of every family of formats: one line, exit status 2, no file left behind."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint_families import FAMILIES, UP, Family, set_dtype, set_number
from tiny_checkpoints import set_type
from tmac_py.cli.main import convert as program


def refused(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says why, of a conversion that must leave everything as it was."""
    before = sorted(tmp_path.rglob("*"))
    assert program([*arguments, "-o", str(tmp_path / "m.lut"), "-q"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("tmac-convert: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return error


def spoil(path: Path, family: Family, value: float) -> None:
    """Write ``value`` over the first number of the family's scales."""
    file = path / family.weights
    if file.suffix != ".gguf":
        set_number(file, family.scales, value)
        return
    from gguf import GGUFReader

    tensor = next(t for t in GGUFReader(file).tensors if t.name == family.scales)
    data = bytearray(file.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(value).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_that_are_not_finite(
    tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = FAMILIES[name].build(tmp_path)
    spoil(tmp_path, FAMILIES[name], value)
    assert FAMILIES[name].matrix in refused(tmp_path, arguments, capsys)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_dtype(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    family = FAMILIES[name]
    arguments = family.build(tmp_path)
    file = tmp_path / family.weights
    if file.suffix == ".gguf":
        set_type(file, family.stored, 26)  # I32
    else:
        set_dtype(file, family.stored)
    assert family.stored in refused(tmp_path, arguments, capsys)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_weights_that_is_cut(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES[name]
    arguments = family.build(tmp_path)
    file = tmp_path / family.weights
    whole = file.read_bytes()
    for size in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert str(file) in refused(tmp_path, arguments, capsys)
    file.unlink()
    assert str(file.parent) in refused(tmp_path, arguments, capsys)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gguf", "lora")])
def test_pickles(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = FAMILIES[name].build(tmp_path)
    file = tmp_path / FAMILIES[name].weights
    pickle = file.rename(file.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin is a pickle, which can run code" in refused(
        tmp_path, arguments, capsys
    )
    for other in ("model.pt", "model.pth", "model.ckpt"):
        pickle = pickle.rename(pickle.with_name(other))
        assert f"{other} is a pickle" in refused(tmp_path, arguments, capsys)
        assert "a pickle, which can run code" in refused(tmp_path, [str(pickle)], capsys)


@pytest.mark.parametrize(
    ("name", "part"), [("gptq", "g_idx"), ("compressed-tensors", "weight_g_idx")]
)
def test_groups_of_columns_that_are_none(
    tmp_path: Path, name: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    arguments = FAMILIES[name].build(tmp_path)
    file = tmp_path / FAMILIES[name].weights
    tensors = load_file(file)
    for value in (-1, 2, 2**31 - 1):  # of two groups
        groups = np.arange(64, dtype=np.int32) // 32
        groups[5] = value
        save_file({**tensors, f"{UP}.{part}": groups}, file)
        error = refused(tmp_path, arguments, capsys)
        assert f"{UP}.weight: g_idx must lie from 0 to 1" in error
    groups[5] = 1  # one column too many
    save_file({**tensors, f"{UP}.{part}": groups}, file)
    assert "must give 32 columns to each group" in refused(tmp_path, arguments, capsys)


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Writes beyond so many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_room_for_the_file(
    tmp_path: Path,
    name: str,
    limit_files: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = FAMILIES[name].build(tmp_path)
    assert program([*arguments, "-o", str(tmp_path / "m.lut"), "-q"]) == 0
    size = (tmp_path / "m.lut").stat().st_size
    (tmp_path / "m.lut").unlink()
    for room in (0, size // 3, size - 1):
        limit_files(room)
        error = refused(tmp_path, arguments, capsys)
        limit_files(resource.RLIM_INFINITY)
        assert error.endswith(f"{tmp_path / 'm.lut'}: File too large\n")
