"""tmac bench: rows, limits, formats, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_model as tiny
from tmac_py import _core
from tmac_py.benchmark import Measurement, Workload, layer_products, weight_bytes, weight_count
from tmac_py.cli.main import bench
from tmac_py.lutfile import LutFile
from tmac_py.sensors import EnergyMeter, FoundMeter

LLAMA_BENCH = {
    *("build_commit", "cpu_info", "model_filename", "model_type", "model_size", "model_n_params"),
    *("n_threads", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns"),
    *("avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}


@pytest.fixture(autouse=True)
def _a_small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the bandwidth itself: a buffer of 4 MiB is read sooner."""
    monkeypatch.setattr("tmac_py.benchmark._BANDWIDTH_BYTES", 1 << 22)


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
        assert 0 < row["load_ns"] < 60e9
        assert (row["first_token_ns"] is None) == (row["n_prompt"] == 0)
        if row["n_prompt"] and not row["n_gen"]:
            assert row["first_token_ns"] <= max(row["samples_ns"])
        assert (row["joules_per_token"] is None) == (row["energy_sensor"] is None)


def test_every_combination_of_lists_is_a_row(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _core.active_isa()
    lists = ["--isa", f"scalar,{before}", "--tables", "int8,exact", "--kv", "f16,int8/int4"]
    arguments = ["-m", str(path), "-p", "0", "-n", "2", "-t", "1", "-r", "1", *lists]
    status, out, _ = run(capsys, *arguments, "-o", "json")
    assert status == 0
    rows = [(row["isa"], row["tables"], row["kv"]) for row in json.loads(out)]
    assert rows == [
        (isa, tables, kv)
        for isa in dict.fromkeys(["scalar", before])
        for tables in ("int8", "exact")
        for kv in ("f16", "int8/int4")
    ]
    assert _core.active_isa() == before
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert re.search(r"\| tables \| +kv \|", out)


def test_energy_is_of_all_tokens(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter(EnergyMeter):
        name = "a sensor"

        def joules(self, run: Callable[[], object], **_options: float) -> float:
            run()
            return 10.0

        def _begin(self) -> None: ...

        def _end(self) -> None: ...

    found = FoundMeter(Meter(), "")
    monkeypatch.setattr("tmac_py.sensors.find_energy_meter", lambda: found)
    arguments = ["-m", str(path), "-p", "4", "-n", "5", "-t", "1", "-r", "1"]
    status, out, _ = run(capsys, *arguments, "-o", "json")
    assert status == 0
    rows = json.loads(out)
    assert [row["joules_per_token"] for row in rows] == [2.5, 2.0]
    assert {row["energy_sensor"] for row in rows} == {"a sensor"}
    assert "|     2.5 |" in run(capsys, *arguments)[1]


def test_every_field_is_documented(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", str(path), "-p", "2", "-n", "0", "-t", "1", "-r", "1", "-o", "json"]
    assert bench(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)
    text = (Path(__file__).parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    table = text.partition("## Fields")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)] == list(row)


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
        head, _, prompt, answer = (dict(zip(lines[0], line, strict=True)) for line in lines)
        assert "kv" not in head
        assert "GMAC/s" in prompt["limit"]
        assert "GB/s" in answer["limit"]
        assert re.fullmatch(r"[0-9.e+]+ ms", prompt["first token"])
        assert answer["first token"] == ""
        assert re.fullmatch(r"[0-9.]+ MiB", answer["peak RSS"])
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
        return Measurement(
            workload,
            *(2, "avx2", "int8", "f16"),
            samples=(2.0, 1.0, 4.0),
            first_tokens=(2.0, 1.0, 4.0) if workload.n_prompt else (),
            load_seconds=0.5,
            peak_memory=None,
            joules=320.0,
            bandwidth=40e9,
            peak=1e12,
            weight_bytes=10**9,
            products=10**10,
        )

    decode = measured(Workload(0, 32))
    assert (decode.rate, decode.weight_rate) == (16, 16e9)
    assert (decode.limit, decode.first_token, decode.joules_per_token) == (40, None, 10)
    assert decode.limit_share == pytest.approx(0.4)
    prompt = measured(Workload(100, 0))
    assert (prompt.rate, prompt.weight_rate) == (50, None)
    assert prompt.limit_share == pytest.approx(0.5)
    assert prompt.first_token == 2
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


def test_a_report_has_the_machine_and_the_rows(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    none = FoundMeter(None, "no sensor here")
    monkeypatch.setattr("tmac_py.sensors.find_energy_meter", lambda: none)
    arguments = ["-m", str(path), "-p", "4", "-n", "5", "-t", "1,2", "-r", "1", "--report"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    facts = {row[0]: row[1] for row in cells if len(row) == 2}
    assert {"machine", "CPU", "cores", "instruction sets", "memory", "governor"} <= facts.keys()
    assert {"highest clock", "power", "system", "tmac_py", "Python"} <= facts.keys()
    assert facts["instruction sets"].endswith(f"used: {_core.active_isa()}")
    bandwidths = r"[0-9.]+ GB/s with 1 thread, [0-9.]+ GB/s with 2 threads"
    assert re.fullmatch(bandwidths, facts["read bandwidth"])
    assert facts["energy"] == "n/a: no sensor here"
    assert {"temperature", "throttling", "other load"} <= facts.keys()
    head = next(row for row in cells if "test" in row)
    rows = [dict(zip(head, row, strict=True)) for row in cells if len(row) == len(head)][2:]
    assert [(row["threads"], row["test"]) for row in rows] == [
        (threads, test) for threads in "12" for test in ("pp4", "tg5")
    ]
    assert {row["J/token"] for row in rows} == {"n/a"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "1000", "-t", "1"], "pp1000 needs 1000 tokens of context, the model has 96"),
        (["-t", "0"], "'0' is not allowed"),
        (["-n", "5-1"], "'5-1' is not allowed"),
        (["-n", "a"], "give whole numbers from 0 up"),
        (["-p", "1-99999999"], "has 99999999 numbers; allowed: at most 1000"),
        (["-pg", "5"], "give two numbers"),
        (["-pg", "0,0"], "one must be above 0"),
        (["-t", "5000"], "give whole numbers from 1 to 1024"),
        (["--isa", "mmx"], "isa 'mmx' does not run here; allowed: all, scalar"),
        (["--tables", "int8,int9"], "tables is 'int9'; allowed: 'int8'"),
        (["--kv", "f16,q8"], "kv is 'q8'; allowed: 'f16'"),
        (["--profile", "-n", "0"], "--profile is of single tokens"),
        (["--report", "-o", "json"], "--report is Markdown"),
        (["--profile", "-o", "json"], "--profile is text"),
        (["--report", "--profile"], "not allowed with argument"),
        (["--sweep", "speed"], "give one or more of threads,bits,isa"),
        (["--sweep", "threads", "--kv", "f16,int8"], "takes one value of --kv"),
        (["--sweep", "threads", "--isa", "all"], "takes one value of --isa"),
        (["--sweep", "bits"], "needs --synthetic SHAPE, or -m several times"),
        (["--sweep", "threads", "--plots", "/no/such/folder"], "no such folder"),
        (["--compare", "a.json", "b.json"], "leave out -m"),
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
