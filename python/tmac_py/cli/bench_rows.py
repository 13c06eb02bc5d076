"""One measurement of ``tmac bench`` as a flat object: llama-bench's names, and some more.

docs/bench.md lists the fields. A field never changes its meaning; SCHEMA counts up if one must.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmac_py.benchmark import Measurement, Setting, Workload
    from tmac_py.lutfile import LutFile
    from tmac_py.sensors import EnergyMeter
    from tmac_py.spec import LinearSpec

SCHEMA = 1
"""Of the rows."""

Row = dict[str, Any]


def measure_rows(
    models: Iterable[tuple[str, Path]],
    workloads: Sequence[Workload],
    settings: Sequence[Setting],
    repetitions: int,
    meter: EnergyMeter | None,
) -> Iterator[Row]:
    """A row for each model, setting and workload, as soon as it is known.

    Args:
        models: names that the user calls them, and .lut files.
        workloads, settings, repetitions, meter: as for :func:`tmac_py.benchmark.measure`.

    Raises:
        TmacError: as of that function.
    """
    from tmac_py.benchmark import measure
    from tmac_py.lutfile import LutFile

    sensor = None if meter is None else meter.name
    for name, path in models:
        with LutFile.open(path, check=False) as file:
            facts = {**_machine(), **_model(name, file)}
        found = measure(path, workloads, settings, repetitions=repetitions, meter=meter)
        for measured in found:
            yield {**facts, **_numbers(measured), "energy_sensor": sensor}


def _machine() -> Row:
    from tmac_py import _core
    from tmac_py.machine import cpu_name

    return {
        "schema": SCHEMA,
        "build_commit": _core.__version__,
        "build_compiler": _core.compiler,
        "cpu_info": cpu_name(),
    }


def _model(name: str, file: LutFile) -> Row:
    from tmac_py.benchmark import weight_count

    spec = _commonest(file)
    kind = spec.encoding if spec.encoding == "ternary" else f"{spec.bits} bits"
    group = "" if spec.group_size == spec.k else f" g{spec.group_size}"
    weights = weight_count(file)
    packed = sum(entry.nbytes for entry in file.tensors.values() if entry.kind == "linear")
    return {
        "model_filename": name,
        "model_type": f"{file.config.architecture} {kind}{group}",
        "model_size": file.nbytes,
        "model_n_params": weights,
        "weight_bits": spec.bits,
        "group_size": spec.group_size,
        "bits_per_weight": packed * 8 / weights,
    }


def _commonest(file: LutFile) -> LinearSpec:
    """How the matrices of most weights are stored: one of these."""
    sizes: dict[tuple[str, int, int], int] = {}
    specs: dict[tuple[str, int, int], LinearSpec] = {}
    for entry in file.tensors.values():
        if (spec := entry.spec) is not None:
            group = 0 if spec.group_size == spec.k else spec.group_size
            key = spec.encoding, spec.bits, group
            sizes[key] = sizes.get(key, 0) + spec.m * spec.k
            specs[key] = spec
    return specs[max(sizes, key=lambda key: sizes[key])]


def _numbers(measured: Measurement) -> Row:
    nanoseconds = [round(seconds * 1e9) for seconds in measured.samples]
    rates = measured.rates
    several = len(rates) > 1
    first = measured.first_token
    return {
        "n_threads": measured.threads,
        "isa": measured.isa,
        "tables": measured.tables,
        "kv": measured.kv,
        "n_prompt": measured.workload.n_prompt,
        "n_gen": measured.workload.n_gen,
        "n_depth": measured.workload.depth,
        "test": measured.workload.name,
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if several else 0,
        "avg_ts": statistics.mean(rates),
        "stddev_ts": statistics.stdev(rates) if several else 0.0,
        "median_ts": measured.rate,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
        "weight_bytes": measured.weight_bytes,
        "weight_bytes_per_second": measured.weight_rate,
        "read_bytes_per_second": measured.bandwidth,
        "multiply_adds_per_second": measured.peak,
        "limit_ts": measured.limit,
        "limit_share": measured.limit_share,
        "first_token_ns": None if first is None else round(first * 1e9),
        "load_ns": round(measured.load_seconds * 1e9),
        "peak_rss_bytes": measured.peak_memory,
        "joules_per_token": measured.joules_per_token,
    }
