"""tmac bench --sweep: what is varied, the plots in the terminal, the pictures."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest

import tiny_model as tiny
from tmac_py import _core
from tmac_py.cli.bench_panels import Panel, Point, make_panels, subtitle
from tmac_py.cli.bench_plot import save, text_plot
from tmac_py.cli.main import bench

QUICK = ["-p", "4", "-n", "2", "-r", "2"]


@pytest.fixture(autouse=True)
def _a_small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the bandwidth itself: a buffer of 4 MiB is read sooner."""
    monkeypatch.setattr("tmac_py.benchmark._BANDWIDTH_BYTES", 1 << 22)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("sweep") / "tiny.lut")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_threads_and_instruction_sets(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", str(path), *QUICK, "--sweep", "threads,isa", "-t", "1-2"]
    isas = list(dict.fromkeys(["scalar", _core.active_isa()]))
    arguments += ["--isa", ",".join(isas), "--plots", str(tmp_path), "-o", "json"]
    assert bench(arguments) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    best = _core.active_isa()
    assert [(row["n_threads"], row["isa"]) for row in rows[:4]] == [
        (1, best),
        (1, best),
        (2, best),
        (2, best),
    ]
    assert [row["isa"] for row in rows[4:]] == [isa for isa in isas for _ in range(2)]
    assert len({row["n_threads"] for row in rows[4:]}) == 1
    assert "pp4, tokens/s; | = limit by int8 multiply peak" in err
    assert "tg2, tokens/s; | = limit by read bandwidth" in err
    for axis in ("threads", "isa"):
        assert str(tmp_path / f"sweep-{axis}.png") in err
        width, height = png_size(tmp_path / f"sweep-{axis}.png")
        assert width > height > 400


def test_bits_of_a_synthetic_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tmac_py.cli.bench_sweep.SWEPT_BITS", (1, 3))
    monkeypatch.chdir(tmp_path)
    arguments = ["--synthetic", "smollm2-135m/1", "--sweep", "bits", "-p", "0", "-n", "1"]
    assert bench([*arguments, "-t", "1", "-r", "1", "--no-plots"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    start = lines.index("tg1, tokens/s; | = limit by read bandwidth")
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["1", "3"]
    title = f"bits of the weights; smollm2-135m/1, {_core.active_isa()}, 1 thread, "
    assert any(line.startswith(title) for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_bits_of_several_files(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.lut"
    other.write_bytes(path.read_bytes())
    models = ["-m", str(path), "-m", str(other)]
    status = bench([*models, *QUICK, "--sweep", "bits", "-t", "1", "--plots", str(tmp_path)])
    assert status == 0
    out, _ = capsys.readouterr()
    assert sum("tiny.lut  " in line for line in out.splitlines()) == 2
    assert sum("other.lut  " in line for line in out.splitlines()) == 2
    png_size(tmp_path / "sweep-bits.png")


def test_no_matplotlib_is_said_before_anything_is_measured(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert bench(["-m", str(path), "--sweep", "threads"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pictures need matplotlib: pip install 'tmac_py[plot]', or --no-plots" in err
    assert err.count("\n") == 1


def row(name: str, threads: int, median: float, limit: float | None, **more: Any) -> dict[str, Any]:
    return {
        "model_filename": name,
        "model_type": "llama 4 bits g32",
        "isa": "avx2",
        "n_threads": threads,
        "n_prompt": 0,
        "test": "tg8",
        "median_ts": median,
        "stddev_ts": 1.0,
        "limit_ts": limit,
        "cpu_info": "a processor",
        **more,
    }


def test_panels_have_a_series_for_each_model() -> None:
    rows = [row(f"/x/{m}.lut", t, 10.0 * t, 40.0) for m in "ab" for t in (1, 2)]
    (panel,) = make_panels("threads", rows)
    assert panel.ticks == ["1", "2"]
    assert panel.series == {f"{m}.lut": [Point(10, 1, 40), Point(20, 1, 40)] for m in "ab"}
    assert panel.limit == "read bandwidth"
    assert subtitle("threads", rows) == "threads; avx2, a processor"
    assert subtitle("threads", rows[:2]) == "threads; a.lut, avx2, a processor"
    both = [row("a", 1, 5.0, None, test="pp4+tg4", n_prompt=4)]
    assert make_panels("isa", both)[0].limit == ""


def test_a_text_plot_draws_speeds_to_scale() -> None:
    panel = Panel(
        "tg8", "threads", ["1", "2"], {"m": [Point(10, 1, 20), Point(20, 0, 40)]}, "bandwidth"
    )
    utf8, ascii_ = (
        io.TextIOWrapper(io.BytesIO(), encoding=encoding) for encoding in ("utf-8", "ascii")
    )
    head, one, two, _ = text_plot(panel, ascii_, 40).split("\n")
    assert head == "tg8, tokens/s; | = limit by bandwidth"
    assert one.endswith("10.00 ± 1.00")
    assert 2 * one.count("#") == two.count("#")
    assert one.index("|") - one.index("#") == 2 * one.count("#")
    assert "█" in text_plot(panel, utf8, 40)


def test_a_picture_shows_series_limits_and_units(tmp_path: Path) -> None:
    points = [Point(10, 1, 20), Point(20, 0, None)]
    panels = [
        Panel("tg8", axis, ["1", "2"], {"a": points, "b": points}, "read bandwidth")
        for axis in ("threads", "isa")
    ]
    with pytest.MonkeyPatch.context() as patch:
        from matplotlib.figure import Figure

        drawn: list[Figure] = []
        original = Figure.savefig
        patch.setattr(
            Figure,
            "savefig",
            lambda self, *args, **kwargs: (drawn.append(self), original(self, *args, **kwargs)),
        )
        save(tmp_path / "x.png", panels, "a title")
    png_size(tmp_path / "x.png")
    (figure,) = drawn
    lines, bars = figure.axes
    assert lines.get_ylabel() == bars.get_ylabel() == "tokens/s (median ± standard deviation)"
    assert (lines.get_xlabel(), bars.get_xlabel()) == ("threads", "instruction set")
    assert lines.get_title() == "tg8 (dashed: limit by read bandwidth)"
    assert sum(line.get_linestyle() == "--" for line in lines.lines) == 2
    assert [patch_.get_height() for patch_ in bars.patches] == [10, 20, 10, 20]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
