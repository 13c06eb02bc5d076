"""tmac bench --compare: what belongs together, the noise band, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

import tiny_model as tiny
from tmac_py.cli.bench_compare import compare_rows
from tmac_py.cli.main import bench
from tmac_py.errors import OptionError


@pytest.fixture(autouse=True)
def _a_small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the bandwidth itself: a buffer of 4 MiB is read sooner."""
    monkeypatch.setattr("tmac_py.benchmark._BANDWIDTH_BYTES", 1 << 22)


def row(rates: list[float], **more: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "model_type": "llama 4 bits g32",
        "model_n_params": 1000,
        "isa": "avx2",
        "n_threads": 2,
        "tables": "int8",
        "kv": "f16",
        "n_prompt": 0,
        "n_gen": 8,
        "n_depth": 0,
        "test": "tg8",
        "median_ts": statistics.median(rates),
        "avg_ts": statistics.mean(rates),
        "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "samples_ts": rates,
        "read_bytes_per_second": 10e9,
        **more,
    }


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ([110, 111, 109], "faster"),
        ([101, 102, 100], "same"),
        ([90, 91, 89], "slower"),
        ([70, 90, 150], "same"),
        ([150], "unknown"),
    ],
)
def test_noise_is_two_deviations_of_a_ratio(rates: list[float], verdict: str) -> None:
    first, second = row([100, 101, 99]), row(rates, read_bytes_per_second=11e9)
    (found,) = compare_rows([first], [second])
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(statistics.median(rates) / 100)
    assert found.bandwidth == pytest.approx(1.1)
    if len(rates) > 1:
        spreads = 0.01, statistics.stdev(rates) / statistics.mean(rates)
        assert found.noise == pytest.approx(2 * math.hypot(*spreads))
    else:
        assert found.noise is None


def test_rows_belong_together_by_workload_and_settings() -> None:
    first = [row([10, 11], n_threads=t, test=f"tg{n}", n_gen=n) for t in (1, 2) for n in (8, 9)]
    second = [row([20, 21], n_threads=t, test=f"tg{n}", n_gen=n) for t in (2, 4) for n in (9, 8)]
    found = compare_rows(first, [*second, row([1, 2])])  # a row measured twice: the first counts
    assert [(one.threads, one.test) for one in found] == [("2", "tg8"), ("2", "tg9")]
    assert {one.a for one in found} == {10.5}
    assert {one.b for one in found} == {20.5}


def test_a_setting_that_differs_throughout_is_what_is_compared() -> None:
    first = [row([10, 11], n_threads=t) for t in (1, 2)]
    second = [row([20, 21], n_threads=t, isa="avx512", kv="int8") for t in (1, 2)]
    found = compare_rows(first, second)
    assert [(one.isa, one.kv, one.threads) for one in found] == [
        ("avx2 → avx512", "f16 → int8", threads) for threads in "12"
    ]


def test_different_models_are_refused() -> None:
    other = row([10, 11], model_type="llama 2 bits g64", model_n_params=2000)
    with pytest.raises(OptionError, match=r"llama 4 bits g32 \(1,000 .* llama 2 bits g64 \(2,000"):
        compare_rows([row([10, 11])], [other])
    with pytest.raises(OptionError, match="no workload and setting in common"):
        compare_rows([row([10, 11])], [row([10, 11], n_gen=9)])


def test_results_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_tiny_model(tmp_path / "tiny.lut")
    for output in ("json", "jsonl"):
        arguments = ["-m", str(model), "-p", "4", "-n", "3", "-t", "1", "-r", "2", "-o", output]
        assert bench(arguments) == 0
        (tmp_path / output).write_text(capsys.readouterr().out)
    first, second = str(tmp_path / "json"), str(tmp_path / "jsonl")
    assert bench(["--compare", first, first]) == 0
    out, _ = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if " tg3 " in line or " pp4 " in line]
    assert [line[-1] for line in rows] == ["same", "same"]
    for output in ("json", "jsonl", "csv"):
        assert bench(["--compare", first, second, "-o", output]) in (0, 1)
        out, _ = capsys.readouterr()
        if output == "json":
            values = json.loads(out)
        elif output == "jsonl":
            values = [json.loads(line) for line in out.splitlines()]
        else:
            values = list(csv.DictReader(io.StringIO(out)))
        assert [value["test"] for value in values] == ["pp4", "tg3"]


def test_exit_status_says_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = write(tmp_path / "slow.json", [row([50, 51, 49])])
    fast = write(tmp_path / "fast.json", [row([100, 101, 99])])
    assert bench(["--compare", str(fast), str(slow)]) == 1
    assert "0.500" in capsys.readouterr().out
    assert bench(["--compare", str(slow), str(fast)]) == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("{", "not a result of tmac-bench -o json"),
        ("\udcff", "not a result of tmac-bench -o json"),
        ("7", "row 1: not an object"),
        (json.dumps([row([1, 2], avg_ts=10**400)]), "allowed: numbers above 0"),
        ('[{"schema": 1}]', "row 1: has no model_type"),
        (json.dumps([row([1, 2]), row([1, 2], schema=2)]), "row 2: schema is 2"),
        (json.dumps([row([1, 2], median_ts="x")]), "median_ts is 'x'"),
        (json.dumps([row([1, 2], median_ts=0)]), "median_ts is 0; allowed: numbers above 0"),
        (json.dumps([row([1, 2], samples_ts=3)]), "samples_ts is not a list"),
        (json.dumps([row([1, 2], isa=[1])]), "isa is [1]"),
    ],
)
def test_files_that_are_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, text: str
) -> None:
    good = write(tmp_path / "good.json", [row([1, 2])])
    bad = tmp_path / "bad.json"
    bad.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert bench(["--compare", str(good), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert str(bad) in err
    assert err.count("\n") == 1


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "No such file" in capsys.readouterr().err
