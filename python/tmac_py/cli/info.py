"""``tmac info``: what this installation and this machine can do."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from tmac_py.cli.tables import format_bytes, format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tmac info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Print the report on stdout; returns the exit status."""
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _report(info))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``tmac info`` shows, as JSON values; sizes in bytes."""
    import numpy as np

    from tmac_py import _core, machine
    from tmac_py.default_model import DEFAULT_MODELS, cached_path
    from tmac_py.modelcache import cache_folder

    total, available = machine.memory_bytes()
    cached = {name: cached_path(name) for name in DEFAULT_MODELS}
    return {
        "version": _core.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "physical_cores": machine.physical_cores(),
        "usable_cpus": len(machine.usable_cpus()),
        "cpu_quota": machine.cpu_quota(),
        "default_threads": machine.default_threads(),
        "memory_bytes": total,
        "available_memory_bytes": available,
        "compiler": _core.compiler,
        "isas": [dict(isa) for isa in _core.isas()],
        "cache": str(cache_folder()),
        "models": {
            name: {
                "path": str(path),
                "size_bytes": path.stat().st_size if path.is_file() else None,
            }
            for name, path in cached.items()
        },
    }


def _report(info: dict[str, Any]) -> str:
    quota = info["cpu_quota"]
    allowed = "" if quota is None else f", {quota:g} by control group"
    memory = "unknown"
    if info["memory_bytes"] is not None:
        memory = (
            f"{format_bytes(info['memory_bytes'])}, "
            f"{format_bytes(info['available_memory_bytes'])} available"
        )
    facts = [
        ("version", f"tmac_py {info['version']}"),
        ("python", f"{info['python']}, numpy {info['numpy']}"),
        ("platform", info["platform"]),
        ("cpu", info["cpu"]),
        ("cores", f"{info['physical_cores']} physical, {info['usable_cpus']} logical{allowed}"),
        ("threads", f"{info['default_threads']} by default (-t)"),
        ("memory", memory),
        ("built by", info["compiler"]),
        ("cache", info["cache"]),
    ]
    for name, model in info["models"].items():
        size = model["size_bytes"]
        state = "not downloaded yet" if size is None else f"{format_bytes(size)} in the cache"
        facts.append(("model", f"{name}: {state}"))
    isas = [("isa", "built", "usable", "active", "why")]
    for isa in info["isas"]:
        flags = (_yes(isa[key]) for key in ("built", "usable", "active"))
        isas.append((isa["name"], *flags, isa["reason"]))
    return f"{format_table(facts, indent='')}\n\n{format_table(isas, indent='')}"


def _yes(flag: bool) -> str:
    return "yes" if flag else "-"
