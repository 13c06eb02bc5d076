"""LutWriter: what it refuses, and that it leaves a whole file or none."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest

from tiny_lut import CONFIG, NORM, Q_PROJ, spec_of, write
from tmac_py.blockwriter import BLOCK_BYTES, BlockWriter
from tmac_py.errors import ModelFileError
from tmac_py.lutheader import packed_nbytes
from tmac_py.lutwriter import LutWriter


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.lut"
    spec = spec_of(CONFIG.tensor_shapes()[Q_PROJ])
    packed = np.zeros(packed_nbytes(spec), np.uint8)
    norm = np.ones(24, np.float32)

    def attempt(action: Callable[[LutWriter], object], text: str) -> None:
        with pytest.raises(ModelFileError, match=re.escape(text)):
            write_some(action)
        assert list(tmp_path.iterdir()) == []

    def write_some(action: Callable[[LutWriter], object]) -> None:
        with LutWriter(path, config=CONFIG, tokenizer={}, source={}) as writer:
            writer.add_linear(Q_PROJ, packed, spec)
            action(writer)

    attempt(lambda w: w.add_linear(Q_PROJ, packed, spec), "added twice")
    attempt(lambda w: w.add_linear("lm_head.weight", packed, spec), "not part of this model")
    other = Q_PROJ.replace("q_proj", "o_proj")
    attempt(lambda w: w.add_linear(other, packed[:-1], spec), "packed must be uint8 [576]")
    attempt(lambda w: w.add_linear(other, packed, replace(spec, m=25)), "must be [24, 24]")
    attempt(lambda w: w.add_linear(other, packed, replace(spec, bits=0)), "bits must be 1 to 8")
    attempt(lambda w: w.add_float(NORM, norm[1:]), "shape [23], must be [24]")
    attempt(lambda w: w.add_float(NORM, norm.astype(np.float64)), "must be float32")
    attempt(lambda w: w.add_float(NORM, norm), "missing model.embed_tokens.weight")
    with pytest.raises(ModelFileError, match="not a tokenizer file name"):
        LutWriter(path, config=CONFIG, tokenizer={"../x": b""}, source={})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    lut = tmp_path / "model.lut"
    write(lut)
    before = lut.read_bytes()

    def write_some() -> None:
        with LutWriter(lut, config=CONFIG, tokenizer={}, source={}) as writer:
            writer.add_float(NORM, np.ones(24, np.float32))
            raise error

    with pytest.raises(error):
        write_some()
    assert lut.read_bytes() == before
    assert list(lut.parent.iterdir()) == [lut]


class FullDisk:
    """A file on a disk that fills up after ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = int(self.file.write(data[: self.room]))
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    path = tmp_path / "model.lut"
    write(path)
    room = int(share * path.stat().st_size)
    path.unlink()
    enter = LutWriter.__enter__

    def enter_with_little_room(writer: LutWriter) -> LutWriter:
        enter(writer)
        writer._file = FullDisk(writer._file, room)  # type: ignore[assignment]
        writer._data = BlockWriter(writer._file, writer._data_start)
        return writer

    monkeypatch.setattr(LutWriter, "__enter__", enter_with_little_room)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "missing" / "model.lut")
    assert caught.value.filename == str(tmp_path / "missing" / "model.lut")


def test_whole_blocks_are_written_at_multiples_of_their_size(tmp_path: Path) -> None:
    """The writes that reach the file: huge pages need them aligned."""
    places: list[tuple[int, int]] = []

    class Recorder:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def seek(self, position: int) -> None:
            self._file.seek(position)

        def write(self, data: memoryview) -> int:
            places.append((self._file.tell(), data.nbytes))
            return self._file.write(data)

    content = np.random.default_rng(0).bytes(3 * BLOCK_BYTES + 777)
    cuts = [0, 5, 1000, BLOCK_BYTES - 2, BLOCK_BYTES + 7, 2 * BLOCK_BYTES, len(content)]
    with (tmp_path / "data").open("xb", buffering=0) as file:
        file.write(b"x" * 100)
        writer = BlockWriter(cast(BinaryIO, Recorder(file)), 100)
        for begin, end in pairwise(cuts):
            writer.append(memoryview(content)[begin:end])
        assert writer.position == 100 + len(content)
        writer.flush()
    assert (tmp_path / "data").read_bytes() == b"x" * 100 + content
    assert places == [
        (100, BLOCK_BYTES - 100),
        (BLOCK_BYTES, BLOCK_BYTES),
        (2 * BLOCK_BYTES, BLOCK_BYTES),
        (3 * BLOCK_BYTES, 877),
    ]
