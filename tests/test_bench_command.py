"""tmac bench: rows, limits, formats, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

import tiny_model as tiny
from tmac_py import _core
from tmac_py.benchmark import Measurement, Workload, layer_products, weight_bytes, weight_count
from tmac_py.cli.main import bench
from tmac_py.lutfile import LutFile

LLAMA_BENCH = {
    *("build_commit", "cpu_info", "model_filename", "model_type", "model_size", "model_n_params"),
    *("n_threads", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns"),
    *("avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny.lut")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = bench(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_rows_of_a_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", str(path), "-p", "8", "-n", "3,5", "-d", "0,20", "-t", "1-2", "-r", "2"]
    status, out, _ = run(capsys, *arguments, "-pg", "6,2", "-o", "json")
    assert status == 0
    rows = json.loads(out)
    names = ["pp8", "tg3", "tg5", "pp6+tg2", "pp8 @ d20", "tg3 @ d20", "tg5 @ d20", "pp6+tg2 @ d20"]
    assert [(row["test"], row["n_threads"]) for row in rows] == [
        (name, threads) for threads in (1, 2) for name in names
    ]
    for row in rows:
        assert set(row) >= LLAMA_BENCH
        assert len(row["samples_ns"]) == 2
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([tokens / ns * 1e9 for ns in row["samples_ns"]])
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert (row["limit_share"] is None) == ("+" in row["test"])
        assert row["isa"] == _core.active_isa()
        assert row["peak_rss_bytes"] > 1 << 20


@pytest.mark.parametrize("output", ["md", "jsonl", "csv"])
def test_other_formats_have_the_same_rows(
    path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    status, out, _ = run(
        capsys, "-m", str(path), "-p", "4", "-n", "4", "-t", "1", "-r", "1", "-o", output
    )
    assert status == 0
    if output == "md":
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
        assert [line[5] for line in lines] == ["test", "--------------:", "pp4", "tg4"]
        assert "GMAC/s" in lines[2][-1]
        assert "GB/s" in lines[3][-1]
    elif output == "jsonl":
        assert [json.loads(line)["test"] for line in out.splitlines()] == ["pp4", "tg4"]
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["test"] for row in rows] == ["pp4", "tg4"]
        assert len(json.loads(rows[0]["samples_ns"])) == 1


def test_synthetic_models_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    name = "smollm2-135m/1:2bit"
    status, out, _ = run(
        capsys, "--synthetic", name, "-p", "0", "-n", "2", "-t", "1", "-r", "1", "-o", "json"
    )
    assert status == 0
    (row,) = json.loads(out)
    assert (row["model_filename"], row["test"]) == (name, "tg2")
    assert list(tmp_path.iterdir()) == []


def test_limits_are_shares_of_what_the_machine_does() -> None:
    def measured(workload: Workload) -> Measurement:
        return Measurement(workload, 2, "avx2", "int8", (2.0, 1.0, 4.0), 40e9, 1e12, 10**9, 10**10)

    decode = measured(Workload(0, 32))
    assert (decode.rate, decode.weight_rate) == (16, 16e9)
    assert decode.limit_share == pytest.approx(0.4)
    prompt = measured(Workload(100, 0))
    assert (prompt.rate, prompt.weight_rate) == (50, None)
    assert prompt.limit_share == pytest.approx(0.5)
    assert measured(Workload(1, 1)).limit_share is None


def test_counts_of_a_file(path: Path) -> None:
    with LutFile.open(path) as file:
        config = file.config
        layer = config.hidden_size * (
            2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
            + 3 * config.intermediate_size
        )
        assert layer_products(file) == 2 * layer
        assert weight_count(file) == 2 * layer + config.vocab_size * config.hidden_size
        linears = [entry.nbytes for entry in file.tensors.values() if entry.kind == "linear"]
        assert weight_bytes(file) == sum(linears)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "1000", "-t", "1"], "pp1000 needs 1000 tokens of context, the model has 96"),
        (["-t", "0"], "'0' is not allowed"),
        (["-n", "5-1"], "'5-1' is not allowed"),
        (["-n", "a"], "give whole numbers from 0 up"),
        (["-pg", "5"], "give two numbers"),
        (["-pg", "0,0"], "one must be above 0"),
        (["--isa", "mmx"], "mmx"),
        (["--synthetic", "gpt:2bit"], "allowed: SHAPE:WEIGHTS"),
    ],
)
def test_what_it_refuses(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    try:
        status = bench(["-m", str(path), *arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    _, err = capsys.readouterr()
    assert status == 2
    assert text in err
    assert err.count("\n") == 1


def test_a_profile_tells_the_parts_of_a_step(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "-m", str(path), "-n", "8", "-d", "5", "-t", "2", "--profile")
    assert status == 0
    head, _, *lines = out.splitlines()
    assert re.fullmatch(r".*tiny\.lut, tg8 @ d5, 2 threads: [0-9.]+ ms a token", head)
    cells = [re.split(r"  +", line.strip()) for line in lines]
    assert cells[0] == ["part", "us", "share"]
    assert [row[0] for row in cells[1:]] == [
        *("embedding", "norms and tables", "q, k, v", "keys and values", "attention"),
        *("attention output", "gate and up", "down", "head"),
    ]
    assert sum(float(row[2].removesuffix("%")) for row in cells[1:]) == pytest.approx(100, abs=1)
