"""``tmac bench``: how fast a model runs, beside what the machine allows; as llama-bench does it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmac_py.cli import bench_options as options
from tmac_py.cli.bench_options import add_arguments
from tmac_py.errors import OptionError

if TYPE_CHECKING:
    from tmac_py.benchmark import Setting, Workload

__all__ = ["add_arguments", "execute"]


def execute(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if args.compare is not None:
        from tmac_py.cli.bench_compare import compare

        if args.model or args.synthetic:
            raise OptionError("--compare measures nothing; leave out -m and --synthetic")
        first, second = args.compare
        return compare(first, second, args.output)
    if args.report and args.output != "md":
        raise OptionError(f"--report is Markdown; leave out -o {args.output}")
    if args.profile and args.output != "md":
        raise OptionError(f"--profile is text; leave out -o {args.output}")
    if args.sweep is not None:
        from tmac_py.cli.bench_sweep import sweep

        return sweep(args)
    workloads, settings = options.workloads(args), options.settings(args)
    chosen = options.models(args)
    with tempfile.TemporaryDirectory(prefix="tmac-bench-") as folder:
        models = options.files(chosen, Path(folder))
        if args.profile:
            _print_profiles(models, workloads, settings)
        elif args.report:
            from tmac_py.cli.bench_report import report

            report(models, workloads, settings, args.repetitions)
        else:
            _print_rows(args, models, workloads, settings)
    return 0


def _print_rows(
    args: argparse.Namespace,
    models: Iterable[tuple[str, Path]],
    workloads: Sequence[Workload],
    settings: Sequence[Setting],
) -> None:
    from tmac_py.cli.bench_output import make_writer, setting_columns
    from tmac_py.cli.bench_rows import measure_rows
    from tmac_py.sensors import find_energy_meter

    writer = make_writer(args.output, extra=setting_columns(settings))
    meter = find_energy_meter().meter
    for row in measure_rows(models, workloads, settings, args.repetitions, meter):
        writer.add(row)
    writer.end()


def _print_profiles(
    models: Iterable[tuple[str, Path]],
    workloads: Sequence[Workload],
    settings: Sequence[Setting],
) -> None:
    from tmac_py.benchmark import load, profile

    decoding = [workload for workload in workloads if not workload.n_prompt]
    if not decoding:
        raise OptionError("--profile is of single tokens; allowed: -n above 0")
    for name, path in models:
        for setting in settings:
            with load(path, setting) as model:
                for workload in decoding:
                    seconds = profile(model, workload.n_gen, workload.depth, setting.kv)
                    print(_profile_text(f"{name}, {workload.name}", setting, seconds), flush=True)


def _profile_text(title: str, setting: Setting, seconds: dict[str, float]) -> str:
    """What the parts of a step take, below a line for all of it."""
    from tmac_py.cli.bench_output import format_threads
    from tmac_py.cli.tables import format_table

    whole = sum(seconds.values())
    rows = [(part, f"{own * 1e6:.0f}", f"{own / whole:.1%}") for part, own in seconds.items()]
    table = format_table([("part", "us", "share"), *rows], right="lrr")
    return f"{title}, {format_threads(setting.threads)}: {whole * 1e3:.2f} ms a token\n\n{table}"
