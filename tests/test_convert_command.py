"""``tmac convert``: its options, its messages, and the file it leaves or does not leave."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import numpy as np
import pytest

from tiny_checkpoints import (
    TINY,
    encode,
    gguf_tensors,
    hf_config,
    random_weights,
    write_gguf,
    write_hf,
    write_speaking,
)
from tmac_py.cli import convert
from tmac_py.cli import main as program
from tmac_py.converters.quantizers import METHODS
from tmac_py.errors import TmacError
from tmac_py.lutfile import LutFile


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.execute(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"), random_weights(TINY), hf_config(TINY))


@pytest.fixture(scope="module")
def speaking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a tokenizer."""
    return write_speaking(tmp_path_factory.mktemp("hf"))


def test_one_summary_line_and_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "m.lut", "--bits", "2", "--head-bits", "4", "--no-asym") == 0
    out, err = capsys.readouterr()
    warning, summary = err.splitlines()
    assert out == ""
    assert warning.startswith("warning: ")
    assert "no tokenizer" in warning
    assert summary.startswith(f"{tmp_path / 'm.lut'}: ")
    assert "bits per weight" in summary
    with LutFile.open(tmp_path / "m.lut") as file:
        spec = file.linear("model.layers.0.mlp.up_proj.weight")[1]
        assert (spec.bits, spec.group_size, spec.offset_kind) == (2, 32, "none")
        assert file.linear("lm_head.weight")[1].bits == 4
        assert file.source["quantised"] == "mse bits=2 head_bits=4 group_size=32 asym=False"


def test_quiet_and_the_other_spelling(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.lut"
    assert run("-q", folder, "-o", out, "--group-size", "-1", "--asym", "--quant", "rtn") == 0
    assert capsys.readouterr() == ("", "")
    with LutFile.open(out) as file:
        spec = file.linear("lm_head.weight")[1]
        assert (spec.bits, spec.group_size, spec.offset_kind) == (6, 256, "offset")


def test_a_file_is_replaced_only_with_force(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.lut"
    out.write_text("mine")
    with pytest.raises(TmacError, match="--force"):
        run(folder, out)
    assert out.read_text() == "mine"
    assert run("-q", "--force", folder, out) == 0
    LutFile.open(out).close()


def test_output_paths_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TmacError, match="one output file"):
        run(folder)
    with pytest.raises(TmacError, match="one output file"):
        run(folder, tmp_path / "a.lut", "-o", tmp_path / "b.lut")
    with pytest.raises(TmacError, match="is a folder"):
        run("--force", folder, tmp_path)
    with pytest.raises(TmacError, match="does not exist"):
        run(folder, tmp_path / "no" / "m.lut")
    assert list(tmp_path.iterdir()) == []


def test_the_examples_in_the_help_are_true(
    speaking_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        program.convert(["--help"])
    assert ended.value.code == 0
    _, _, text = capsys.readouterr().out.partition("examples:\n")
    examples = [shlex.split(line) for line in text.partition("\n\n")[0].splitlines()]
    methods = [words[words.index("--quant") + 1] for words in examples if "--quant" in words]
    assert methods == list(METHODS) == list(convert.METHODS)
    monkeypatch.chdir(tmp_path)
    for name, source, *arguments in examples:
        assert name == "tmac-convert"
        if source.endswith(".gguf"):
            kind = source.split(".")[-2]
            tensors = gguf_tensors(random_weights(TINY), TINY, kind)
            write_gguf(tmp_path / source, TINY, tensors)
        else:
            (tmp_path / source).parent.mkdir(exist_ok=True)
            (tmp_path / source).unlink(missing_ok=True)
            (tmp_path / source).symlink_to(speaking_folder)
        assert program.convert(["--force", source, *arguments]) == 0


def test_options_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(random_weights(TINY), TINY, "Q8_0"))
    out = tmp_path / "m.lut"
    assert program.convert([str(path), str(out), "--quant", "mse", "--bits", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tmac-convert: error: {path}: quant, bits would have no effect")
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(random_weights(TINY), TINY, "Q8_0"))
    before = path.read_bytes()
    with pytest.raises(TmacError, match="is the source"):
        run("--force", path, path)
    assert path.read_bytes() == before


def test_codebooks_and_adapters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    tensors["blk.0.ffn_up.weight"] = (encode(np.zeros((512, 256), np.float32), "IQ4_XS"), "IQ4_XS")
    path, out = write_gguf(tmp_path / "m.gguf", TINY, tensors), tmp_path / "m.lut"
    assert program.convert([str(path), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "up_proj.weight IQ4_XS; --requantize" in error
    assert not out.exists()
    assert program.convert([str(path), str(out), "--requantize", "--bits", "4"]) == 0
    capsys.readouterr()
    assert program.convert([str(folder), str(out), "--force", "--lora", str(tmp_path)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--quant", "awesome"), "invalid choice"),
        (("--bits-for", "down_proj"), "must be REGEX=BITS"),
        (("--bits-for", "=4"), "must be REGEX=BITS"),
        (("--bits-for", "down_proj=9"), "bits_for down_proj 9 is not supported (1 to 8)"),
        (("--bits-for", "(=4"), "is not a regular expression"),
        (("--bits-for", "experts=4"), "bits_for 'experts' would have no effect"),
        (("--quant", "hqq", "--no-asym"), "always stores offsets"),
        (("--target-bpw", "0"), "target_bpw 0.0 is not supported"),
        (("--target-bpw", "nan"), "target_bpw nan is not supported"),
        (("--target-bpw", "4", "--bits", "4"), "bits cannot be given too"),
        (("--target-bpw", "0.5"), "target_bpw 0.5 cannot be met"),
        (("--target-bpw", "20"), "target_bpw 20 cannot be met"),
        (("--target-bpw", "4", "--head-bits", "4", "--bits-for", "layers=4"), "no effect"),
        (("--act-order",), "quant mse keeps the order of columns: act_order needs bcq and gptq"),
        (("--quant", "awq", "--act-order"), "quant awq keeps the order"),
        (("--calibration-tokens", "100"), "calibration_tokens would have no effect"),
        (("--quant", "gptq", "--calibration-tokens", "0"), "calibration_tokens 0 is not supported"),
        (("--quant", "gptq", "--calibration", "missing.txt"), "missing.txt: No such file"),
        (("--quant", "gptq", "--calibration", "latin.txt"), "needs a text in UTF-8"),
        (("--quant", "awq", "--calibration", "short.txt"), "short.txt has 3 tokens"),
    ],
)
def test_what_cannot_be_is_one_line(
    speaking_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
    Path("short.txt").write_text("xyz")
    try:
        status = program.convert([str(speaking_folder), "m.lut", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    error = capsys.readouterr().err
    assert status == 2
    assert text in error
    assert len(error.splitlines()) == 1
    assert not Path("m.lut").exists()


def test_calibration_needs_a_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.convert([str(folder), str(tmp_path / "m.lut"), "--quant", "gptq"]) == 2
    assert "calibration needs a tokenizer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
