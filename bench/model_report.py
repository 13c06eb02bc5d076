"""The text and the JSON of models.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from measure import Spread, describe, describe_load

from tmac_py.cli.tables import format_table

if TYPE_CHECKING:
    from models import Entry, Results


def report(facts: dict[str, Any], settings: dict[str, Any], results: Results) -> str:
    """The text that is printed."""
    steps = settings["tests"].get("decode", 0) + 1
    heading = [
        *describe(facts),
        *((name, _peer(peer)) for name, peer in facts["peers"].items()),
        ("model", f"{facts['model']}, {results.contenders[0].kernel} tables"),
        *(
            ("agreement", f"tmac_py chooses {name}'s token at {equal} of {steps} steps")
            for name, equal in results.equal_choices.items()
        ),
        ("others", describe_load(facts["other_load_cpus"])),
        ("samples", f"{settings['rounds']} pairs; shown: median (lowest-highest)"),
        *(("note", note) for note in results.notes),
    ]
    roofs: list[tuple[str, ...]] = [
        ("threads", "memory GB/s", "model-sized buffer GB/s", "int8 10⁹ multiply-adds/s")
    ]
    for threads, roof in results.roofs.items():
        columns = (roof.memory_gb_s, roof.model_gb_s, roof.multiply_gop_s)
        roofs.append((str(threads), *(str(Spread.of(column)) for column in columns)))
    return "\n\n".join(
        (
            format_table(heading, indent=""),
            format_table(_rows(settings, results), right="rlrlrrrr", indent=""),
            "What the machine gave in the same run:",
            format_table(roofs, right="rrrr", indent=""),
        )
    )


def _peer(facts: dict[str, Any]) -> str:
    return f"{facts['package']} {facts['version']}: {' '.join(facts['features'])}"


def _rows(settings: dict[str, Any], results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("threads", "test", "MB/token", "engine", "tok/s", "of roof", "tmac_py beside", "ratio")
    ]
    ours = results.contenders[0]
    for threads in results.roofs:
        for test, tokens in settings["tests"].items():
            own = [e for e in results.entries if (e.threads, e.test) == (threads, test)]
            if not own:
                continue
            samples = [sample for entry in own for sample in entry.ours]
            label = (str(threads), f"{test} {tokens}")
            share = _share(results, test, threads, ours.bytes_per_token, samples)
            rows.append(
                (
                    *label,
                    _mb(ours.bytes_per_token),
                    ours.name,
                    str(Spread.of(samples)),
                    share,
                    "",
                    "",
                )
            )
            for entry in own:
                contender = entry.contender
                if contender is ours:
                    continue
                share = _share(results, test, threads, contender.bytes_per_token, entry.samples)
                rows.append(
                    (
                        *label,
                        _mb(contender.bytes_per_token),
                        contender.name,
                        str(Spread.of(entry.samples)),
                        share,
                        str(Spread.of(entry.ours)),
                        str(ratio(entry)),
                    )
                )
    return rows


def ratio(entry: Entry) -> Spread:
    """Of the pairs: tmac_py / peer."""
    return Spread.of([a / b for a, b in zip(entry.ours, entry.samples, strict=True)])


def _share(results: Results, test: str, threads: int, nbytes: int, samples: list[float]) -> str:
    """Of the read bandwidth when decoding (the higher of the two), of the int8 peak in prefill."""
    roof, rate = results.roofs[threads], Spread.of(samples).median
    if test == "decode":
        limit = max(Spread.of(roof.memory_gb_s).median, Spread.of(roof.model_gb_s).median)
        return f"{rate * nbytes / 1e9 / limit:.0%}"
    return f"{rate * results.products / 1e9 / Spread.of(roof.multiply_gop_s).median:.0%}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f}"


def as_json(facts: dict[str, Any], settings: dict[str, Any], results: Results) -> dict[str, Any]:
    """The report with all samples."""
    return {
        "machine": facts,
        "settings": settings,
        "roofs": {threads: asdict(roof) for threads, roof in results.roofs.items()},
        "equal_choices": results.equal_choices,
        "notes": results.notes,
        "entries": [
            {
                "engine": entry.contender.party,
                "kernel": entry.contender.kernel,
                "bytes_per_token": entry.contender.bytes_per_token,
                "test": entry.test,
                "threads": entry.threads,
                "tok_s": entry.samples,
                "tmac_py_tok_s": entry.ours,
                "ratio": asdict(ratio(entry)),
            }
            for entry in results.entries
        ],
    }
