"""``tmac bench --sweep``: one thing varies, the rest stays; tables, and plots of the speeds."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmac_py.cli import bench_options as options
from tmac_py.cli.bench_options import BenchModel
from tmac_py.cli.bench_output import make_writer, setting_columns
from tmac_py.cli.bench_panels import make_panels, subtitle
from tmac_py.cli.bench_plot import need_matplotlib, save, text_plot
from tmac_py.cli.bench_rows import measure_rows
from tmac_py.errors import OptionError
from tmac_py.machine import default_threads

if TYPE_CHECKING:
    from tmac_py.benchmark import Setting

SWEPT_BITS = (1, 2, 3, 4, 8)
"""Of a synthetic shape."""


def sweep(args: argparse.Namespace) -> int:
    """Measure along each axis, print the rows, plot them; returns the exit status."""
    from tmac_py.sensors import find_energy_meter

    workloads = options.workloads(args)
    if not args.no_plots:
        need_matplotlib()
        if not args.plots.is_dir():
            raise OptionError(f"{args.plots}: no such folder for the plots")
    plans = _plans(args)
    meter = find_energy_meter().meter
    writer = make_writer(args.output, extra=setting_columns(plans[0].settings))
    drawn = []
    with tempfile.TemporaryDirectory(prefix="tmac-bench-") as folder:
        for plan in plans:
            models = options.files(plan.models, Path(folder))
            found = []
            for row in measure_rows(models, workloads, plan.settings, args.repetitions, meter):
                writer.add(row)
                found.append(row)
            drawn.append((plan.axis, found))
    writer.end()
    out = sys.stdout if args.output == "md" else sys.stderr
    for axis, found in drawn:
        panels = make_panels(axis, found)
        print(f"\n{subtitle(axis, found)}", file=out)
        print("".join(f"\n{text_plot(panel, out)}" for panel in panels), file=out, flush=True)
        if not args.no_plots:
            path = args.plots / f"sweep-{axis}.png"
            save(path, panels, f"tmac-bench: {subtitle(axis, found)}")
            print(f"\n{path}", file=out)
    return 0


@dataclass(frozen=True)
class _Plan:
    """What is measured along one axis."""

    axis: str
    models: list[BenchModel]
    settings: list[Setting]


def _plans(args: argparse.Namespace) -> list[_Plan]:
    """One for each axis; OptionError for options that do not go together."""
    given = {"-t": args.threads, "--isa": args.isa, "--tables": args.tables, "--kv": args.kv}
    swept = {"threads": "-t", "isa": "--isa"}
    for flag, values in given.items():
        if len(values or []) > 1 and flag not in [swept.get(axis) for axis in args.sweep]:
            raise OptionError(f"--sweep {','.join(args.sweep)} takes one value of {flag}")
    if "isa" not in args.sweep and args.isa == ["all"]:
        raise OptionError(f"--sweep {','.join(args.sweep)} takes one value of --isa")
    settings = options.settings(args)
    base = replace(
        settings[0],
        threads=default_threads() if "threads" in args.sweep else settings[0].threads,
        isa=None if "isa" in args.sweep else settings[0].isa,
    )
    along = {
        "threads": [
            replace(base, threads=n) for n in args.threads or _thread_counts(default_threads())
        ],
        "isa": [replace(base, isa=name) for name in options.isas(args) or options.usable_isas()],
        "bits": [base],
    }
    bits = _of_all_bits(args) if "bits" in args.sweep else []
    same = options.models(args) if set(args.sweep) != {"bits"} else []
    return [_Plan(axis, bits if axis == "bits" else same, along[axis]) for axis in args.sweep]


def _thread_counts(most: int) -> list[int]:
    """Powers of two below ``most``, and it."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def _of_all_bits(args: argparse.Namespace) -> list[BenchModel]:
    """The models whose bits differ: those given, and each synthetic shape at several bits."""
    shapes = dict.fromkeys(text.partition(":")[0] for text in args.synthetic)
    texts = [f"{shape}:{bits}bit" for shape in shapes for bits in SWEPT_BITS]
    if len(args.model) + len(texts) < 2:
        raise OptionError("--sweep bits needs --synthetic SHAPE, or -m several times")
    if args.model and texts:
        raise OptionError("--sweep bits takes models by -m or by --synthetic, not by both")
    return options.models(argparse.Namespace(**{**vars(args), "synthetic": texts}))
