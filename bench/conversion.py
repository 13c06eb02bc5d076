"""How fast checkpoints of each kind become .lut files, and how much memory that takes.

    python bench/conversion.py

Writes checkpoints of random numbers in the shapes of Llama-2-7B with few layers, converts each in a
process of its own and prints a Markdown table. Matrices stored as floats are rounded by --quant.
MB/s are bytes of the .lut over the time until it stands on the disk, and over the time that all
cores together were busy: the latter says what the machine can do where other programs run too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from measure import Spread, machine_facts
from synthetic_checkpoints import FOLDERS, KINDS, write_checkpoint

from tmac_py.synthetic import SHAPES

_SAMPLE_SECONDS = 0.005

_CONVERT = """
import json, resource, sys, time
from tmac_py.converters import convert
source, out, options = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
convert(source, out, **json.loads(options))
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_SELF)
busy = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([seconds, busy, usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Run:
    """One conversion: seconds of wall clock and of all cores, bytes of the file, peaks of memory.

    ``anonymous`` is what the process itself allocated; ``resident`` counts mapped pages of source
    files too, which the system takes back when it needs them.
    """

    seconds: float
    cpu_seconds: float
    nbytes: int
    anonymous: int
    resident: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--vocab", type=int, default=1024, help="default: 1024")
    parser.add_argument("--quant", default="rtn", help="method for floats (default: rtn)")
    parser.add_argument("--bits", type=int, default=4, help="bits for floats (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each (default: 3)")
    parser.add_argument("--cold", action="store_true", help="drop the source from memory first")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    config = replace(SHAPES["llama-2-7b"], num_hidden_layers=args.layers, vocab_size=args.vocab)
    print(f"<!-- {json.dumps(machine_facts())} -->")
    print(f"{args.layers} layers, vocabulary of {args.vocab}, floats by {args.quant}\n")
    print("| kind | source MB | .lut MB | s | MB/s | of a core | allocated MB | RSS MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for kind in args.kinds.split(","):
            folder = Path(temporary) / kind
            folder.mkdir()
            source = write_checkpoint(kind, config, folder)
            files = [path for path in folder.iterdir() if path.is_file()]
            os.sync()
            out = Path(temporary) / "model.lut"
            options = {"quant": args.quant, "bits": args.bits, "head_bits": 8}
            if kind in FOLDERS and kind != "bf16":
                options.pop("bits")
            runs = []
            for _ in range(args.rounds):
                if args.cold:
                    drop_from_memory(files)
                runs.append(run(source, out, options if kind in FOLDERS else {}))
                out.unlink()
            print(row(kind, sum(path.stat().st_size for path in files), runs), flush=True)
            for path in files:
                path.unlink()


def run(source: Path, out: Path, options: dict[str, object]) -> Run:
    """Convert in a new process."""
    command = [sys.executable, "-c", _CONVERT, str(source), str(out), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            time.sleep(_SAMPLE_SECONDS)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the conversion of {source} failed")
    seconds, cpu_seconds, resident = json.loads(text)
    return Run(seconds, cpu_seconds, out.stat().st_size, anonymous, resident)


def anonymous_bytes(pid: int) -> int:
    """What a process has allocated and touched (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 0 if match is None else int(match[1]) * 1024


def drop_from_memory(files: list[Path]) -> None:
    """Make the next reader fetch the files from the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def row(kind: str, source_bytes: int, runs: list[Run]) -> str:
    speed = Spread.of([run.nbytes / run.seconds / 1e6 for run in runs])
    seconds = Spread.of([run.seconds for run in runs]).median
    core_speed = Spread.of([run.nbytes / run.cpu_seconds / 1e6 for run in runs])
    anonymous = max(run.anonymous for run in runs)
    resident = max(run.resident for run in runs)
    return (
        f"| {kind} | {source_bytes / 1e6:.0f} | {runs[0].nbytes / 1e6:.0f} | {seconds:.2f} "
        f"| {speed} | {core_speed} | {anonymous / 1e6:.0f} | {resident / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
