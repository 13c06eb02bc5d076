"""The .lut file: round trips, safetensors' own view, and damage of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash

from tiny_lut import CONFIG, NORM, Q_PROJ, SOURCE, TOKENIZER, contents, spec_of, write
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile


@pytest.fixture
def lut(tmp_path: Path) -> Path:
    path = tmp_path / "model.lut"
    write(path)
    return path


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header as JSON and the data of a file."""
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:end]), blob[end:]


def join(path: Path, header: dict[str, Any], data: bytes, *, sign: bool = True) -> None:
    """Write a file with this header, its checksum made right unless told otherwise."""
    if sign:
        header["__metadata__"]["tmac.header"] = "0" * 32
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    if sign:
        digest = xxhash.xxh3_128_hexdigest(text).encode()
        text = text.replace(b'"tmac.header": "' + b"0" * 32, b'"tmac.header": "' + digest)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refusal(path: Path) -> str:
    """The error's text without the path that it must start with."""
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        LutFile.open(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text[len(str(path)) + 2 :]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.lut"
    tensors = write(path)
    with LutFile.open(path) as file:
        assert file.config == CONFIG
        assert file.source == SOURCE
        assert file.tokenizer == TOKENIZER
        assert file.metadata["tmac.format"] == "1"
        assert file.nbytes == path.stat().st_size
        for name, values in tensors.items():
            if values.dtype == np.uint8:
                packed, spec = file.linear(name)
                assert spec == spec_of(CONFIG.tensor_shapes()[name])
                np.testing.assert_array_equal(packed, values)
                assert packed.ctypes.data % 64 == 0
            else:
                packed = file.float(name)  # type: ignore[assignment]
                np.testing.assert_array_equal(packed, values)
                assert packed.dtype == np.float32
            assert not packed.flags.owndata
            assert not packed.flags.writeable
    assert [item.name for item in tmp_path.iterdir()] == ["model.lut"]


def test_safetensors_opens_it(lut: Path) -> None:
    tensors = contents()
    with safetensors.safe_open(lut, framework="numpy") as file:
        assert file.metadata()["tmac.format"] == "1"
        assert set(file.keys()) == set(tensors) | {f"tokenizer/{name}" for name in TOKENIZER}
        for name, values in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), values)
        assert file.get_tensor("tokenizer/z").tobytes() == b"abc"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.lut")
    write(tmp_path / "b.lut")
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()


def test_views_outlive_the_file(lut: Path) -> None:
    file = LutFile.open(lut)
    view = file.float(NORM)
    file.close()
    file.close()
    np.testing.assert_array_equal(view, contents()[NORM])
    with pytest.raises(ValueError, match="closed"):
        file.float(NORM)


def test_names_of_the_wrong_kind_are_key_errors(lut: Path) -> None:
    with LutFile.open(lut) as file:
        with pytest.raises(KeyError):
            file.float(Q_PROJ)
        with pytest.raises(KeyError):
            file.linear(NORM)


def test_every_damaged_byte_of_the_data_is_found(lut: Path) -> None:
    header, data = split(lut)
    for name, entry in header.items():
        if name == "__metadata__" or entry["shape"] == [0]:
            continue
        begin, end = entry["data_offsets"]
        for position in (begin, end - 1):
            damaged = bytearray(data)
            damaged[position] ^= 1
            blob = lut.read_bytes()
            lut.write_bytes(blob[: -len(data)] + bytes(damaged))
            assert refusal(lut).startswith(f"tensor {name} does not match its checksum")
            LutFile.open(lut, check=False).close()
            lut.write_bytes(blob)


def test_every_altered_byte_of_the_header_is_found(lut: Path) -> None:
    blob = bytearray(lut.read_bytes())
    length = 8 + int.from_bytes(blob[:8], "little")
    for position in (*range(64), *range(64, length, 7), length - 1):
        blob[position] ^= 1
        lut.write_bytes(blob)
        refusal(lut)
        blob[position] ^= 1


def test_truncation_is_found_everywhere(lut: Path) -> None:
    blob = lut.read_bytes()
    length = 8 + int.from_bytes(blob[:8], "little")
    for size in (1, 8, 9, 100, length - 1, length, length + 1, len(blob) - 1):
        lut.write_bytes(blob[:size])
        assert "truncated" in refusal(lut) or size < 9
    lut.write_bytes(blob + b"x")
    assert refusal(lut) == "longer than the header says (excess bytes: 1)"


def make_folder(path: Path) -> None:
    path.mkdir()


def make_plain_safetensors(path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(4, np.float32)}, path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Path.absolute, "no such file"),
        (make_folder, "a folder, not a .lut file"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "a GGUF file, not a .lut file"),
        (lambda path: path.write_bytes(b"#!/bin/sh\necho hello\n"), "not a .lut file"),
        (lambda path: path.write_bytes(bytes(200)), "not a .lut file"),
        (lambda path: path.symlink_to("/dev/null"), "not a regular file"),
        (make_plain_safetensors, "a safetensors file, but not a .lut"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, make: Callable[[Path], object], text: str
) -> None:
    path = tmp_path / "thing"
    make(path)
    assert refusal(path).startswith(text)


@pytest.mark.parametrize("version", ["9" * 5000, "\u0661", "-1", "", " 1", "1.0"])
def test_a_version_that_is_no_number(lut: Path, version: str) -> None:
    header, data = split(lut)
    header["__metadata__"]["tmac.format"] = version
    join(lut, header, data)
    text = refusal(lut)
    assert "is not a number" in text
    assert len(text) < 100


def test_newer_version_says_so_before_anything_else(lut: Path) -> None:
    header, data = split(lut)
    header["__metadata__"] = {"tmac.format": "3", "tmac.new": "?"}
    join(lut, header, data, sign=False)
    assert refusal(lut).startswith("written in format version 3, newer than version 2")


def change(header: dict[str, Any], key: str, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(header["__metadata__"][key])
    edit(value)
    header["__metadata__"][key] = json.dumps(value)


def set_spec(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: change(header, "tmac.tensors", lambda t: t[Q_PROJ].update(fields))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (set_spec(bits=9), f"tensor {Q_PROJ}: bits must be 1 to 8, found 9"),
        (set_spec(bits=4), f"tensor {Q_PROJ}: holds 576 bytes, must hold 640"),
        (set_spec(group_size=6), "group_size must be a multiple of 4"),
        (
            set_spec(layout="planes8"),
            "layout 'planes8' is not known (planes421-m32, trits3-m32, bcq-m32)",
        ),
        (
            set_spec(layout="trits3-m32"),
            "layout trits3-m32 needs bits 2, offset_kind none and zero 1",
        ),
        (set_spec(layout="bcq-m32"), "holds 576 bytes, must hold 832"),
        (
            set_spec(layout="bcq-m32", bits=5),
            "layout bcq-m32 needs bits 1 to 4, offset_kind offset and zero 0, found 5,",
        ),
        (set_spec(layout="bcq-m32", offset_kind="zero"), "offset_kind offset and zero 0"),
        (set_spec(layout="bcq-m32", zero=1.0), "offset_kind offset and zero 0"),
        (set_spec(layout="bcq-m32", scale=1.0), "scale needs a ternary layout"),
        (set_spec(scale=1.0), "scale needs a ternary layout"),
        (set_spec(scale="a"), "scale must be a finite number"),
        (set_spec(offset_kind="min"), "offset_kind must be"),
        (set_spec(zero="a"), "zero must be a finite number"),
        (set_spec(xxh3="0"), "xxh3 must be 32"),
        (set_spec(colour=1), "tmac.tensors must hold exactly"),
        (set_spec(m=23), "wrong shape"),
        (lambda h: h["__metadata__"].pop("tmac.source"), "the header lacks tmac.source"),
        (lambda h: h.pop(NORM), f"header and tmac.tensors disagree about {NORM}"),
        (lambda h: h[NORM].update(dtype="F16"), f"tensor {NORM}: tmac.tensors must hold exactly"),
        (lambda h: h[Q_PROJ].update(shape=[1]), "does not agree with its 576 bytes"),
        (lambda h: h[Q_PROJ].update(data_offsets=[0, -1]), "non-negative"),
        (lambda h: change(h, "tmac.config", lambda c: c.pop("hidden_act")), "config: missing key"),
        (lambda h: change(h, "tmac.config", lambda c: c.update(architecture="x")), "architecture"),
        (
            lambda h: change(h, "tmac.config", lambda c: c.update(num_hidden_layers=3)),
            "tensors do not match the configuration: missing model.layers.2.input_layernorm.weight",
        ),
        (
            lambda h: change(h, "tmac.config", lambda c: c.update(num_hidden_layers=1)),
            "tensors do not match the configuration: unexpected model.layers.1.",
        ),
        (lambda h: h["__metadata__"].update({"tmac.config": "[" * 10**5}), "not readable JSON"),
    ],
)
def test_inconsistent_headers_are_explained(
    lut: Path, edit: Callable[[dict[str, Any]], object], text: str
) -> None:
    header, data = split(lut)
    edit(header)
    join(lut, header, data)
    assert text in refusal(lut)


def test_overlapping_tensors_are_refused(lut: Path) -> None:
    header, data = split(lut)
    for key in ("k_proj", "v_proj"):
        header[f"model.layers.0.self_attn.{key}.weight"]["data_offsets"] = [0, 576]
    join(lut, header, data)
    assert "starts at byte" in refusal(lut)


def test_a_key_that_stands_twice_is_refused(lut: Path) -> None:
    header, data = split(lut)
    join(lut, header, data)
    blob = lut.read_bytes()
    lut.write_bytes(blob.replace(b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"', 1))
    assert "not readable JSON" in refusal(lut)
