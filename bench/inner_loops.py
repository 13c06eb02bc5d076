"""Cycles of the inner loops on chips that are not at hand, by llvm-mca: tables against multiplying.

    python bench/inner_loops.py --output inner_loops.md

Compiles the table kernels for each chip as CMakeLists.txt does, and bench/inner_loops/multiply.cc
with the same flags; cuts the loop over regions of weights out of the assembly, and lets llvm-mca
step through it. One token, one thread. Needs GCC for both architectures and LLVM 17 or later.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from inner_loops_assembly import InnerLoop, LoopError, functions, inner_loop

ROOT = Path(__file__).resolve().parent.parent

Kernel = Literal["int8", "exact", "multiply"]
# Parts of the symbol of each kernel for one token, by its struct of operations, bits and the
# tables' parts. The first that exists counts: the loop may have been inlined into its caller.
SYMBOLS: dict[Kernel, tuple[str, ...]] = {
    "int8": (
        r"TileProductINS0_\d+{type}ELi{bits}ELi1ELi1EE3run",
        r"multiply_tileINS0_\d+{type}ELi{bits}ELi1EE",
    ),
    "exact": (
        r"TileProductINS0_\d+{type}ELi{bits}ELi2ELi1EE3run",
        r"multiply_tileINS0_\d+{type}ELi{bits}ELi2EE",
    ),
    "multiply": (r"8multiplyILi{bits}EE",),
}
LOOKUPS_OF_A_BYTE: dict[Kernel, int] = {"int8": 2, "exact": 4, "multiply": 0}
BITS = (1, 2, 3, 4, 8)
ITERATIONS = 200  # regions that llvm-mca steps through
OLDEST_LLVM = 17  # the first with models of Neoverse N1 and of Alder Lake's P core

# GCC's scheduling before register allocation, which it leaves off on x86, makes the multiplying
# loops spill on Arm: they are shown at their best.
MULTIPLY_FLAGS = ("-fno-schedule-insns",)


@dataclass(frozen=True)
class Chip:
    """A core that llvm-mca knows and the row of CMakeLists.txt that runs on it."""

    name: str
    isa: str
    mcpu: str
    dispatch: int | None = None  # instructions a cycle, where LLVM's model has another number


CHIPS = (
    Chip("Cortex-A72 (Raspberry Pi 4)", "neon", "cortex-a72"),
    # Both decode four instructions a cycle and have the same vector units. LLVM 22 still has
    # Cortex-A57's model under the name cortex-a76.
    Chip("Cortex-A76 (Raspberry Pi 5), Neoverse N1", "neon_dotprod", "neoverse-n1", dispatch=4),
    Chip("Alder Lake (P core)", "avx2", "alderlake"),
    Chip("Alder Lake (P core)", "avx2vnni", "alderlake"),
)


@dataclass(frozen=True)
class Isa:
    """A row of CMakeLists.txt."""

    name: str
    architecture: str
    header: str
    type: str
    flags: tuple[str, ...]

    @property
    def compiler(self) -> str:
        """GCC for this architecture, by Debian's name."""
        return f"{self.architecture}-linux-gnu-g++"


@dataclass(frozen=True)
class Row:
    """What llvm-mca says of one loop."""

    chip: str
    isa: str
    bits: int
    kernel: Kernel
    nbytes: int  # of packed weights in one turn of the loop
    instructions: int
    cycles: float  # of a turn, stepped through
    bound: float  # of a turn, if only ports and dispatch were to limit it

    @property
    def cycles_per_byte(self) -> float:
        """Of packed weights."""
        return self.cycles / self.nbytes

    @property
    def weights_per_cycle(self) -> float:
        """Of one row and one column each."""
        return self.nbytes * 8 / self.bits / self.cycles


def isas() -> dict[str, Isa]:
    """The rows of CMakeLists.txt by name."""
    text = (ROOT / "CMakeLists.txt").read_text()
    row = r'^tmac_isa\(\s*(\w+)\s+"([^"]*)"\s+(\S+)\s+(\w+)\s+"([^"]*)"'
    return {
        name: Isa(name, architecture, header, type_, tuple(filter(None, flags.split(";"))))
        for name, architecture, header, type_, flags in re.findall(row, text, re.MULTILINE)
    }


def common_flags() -> list[str]:
    """How a Release build compiles everything."""
    options = re.search(r"add_compile_options\(([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    chosen = [flag for flag in (options[1].split() if options else []) if flag.startswith("-f")]
    return ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-w", *chosen]


def region_bytes(bits: int) -> int:
    """Packed bytes of one region of activations times the rows of a tile."""
    return (
        bits
        * _constant("layout/layout.h", "kTileRows")
        * (_constant("layout/region.h", "kRegionWeights") // 8)
    )


def _constant(header: str, name: str) -> int:
    found = re.search(rf"\b{name} = (\d+);", (ROOT / "csrc" / header).read_text())
    if found is None:
        raise LoopError(f"csrc/{header} has no {name}")
    return int(found[1])


def compile_kernels(isa: Isa) -> dict[str, list[str]]:
    """The functions of the table kernels and of the multiplying ones, as lines of assembly."""
    tables = [
        str(ROOT / "csrc/kernels/isa.cc"),
        f"-I{ROOT / 'csrc'}",
        f"-DTMAC_ISA_NAME={isa.name}",
        f'-DTMAC_ISA_HEADER="simd/{isa.header}"',
        f"-DTMAC_ISA_TYPE={isa.type}",
    ]
    multiply = [str(ROOT / "bench/inner_loops/multiply.cc"), *MULTIPLY_FLAGS]
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernels.s")
        for arguments in (tables, multiply):
            command = [isa.compiler, *common_flags(), *isa.flags, *arguments]
            subprocess.run([*command, "-S", "-o", str(output)], check=True)
            found |= functions(output.read_text())
    return found


def loop_of(code: dict[str, list[str]], isa: Isa, kernel: Kernel, bits: int) -> InnerLoop:
    """The inner loop of one kernel; raises LoopError if it cannot be told."""
    for symbol in SYMBOLS[kernel]:
        pattern = re.compile(symbol.format(type=isa.type, bits=bits))
        names = [n for n in code if pattern.search(n) and ".cold" not in n and ".part" not in n]
        if names:
            return inner_loop(
                code[names[0]],
                lookups_of_a_byte=LOOKUPS_OF_A_BYTE[kernel],
                region_bytes=region_bytes(bits),
            )
    raise LoopError(f"no symbol like {SYMBOLS[kernel][0].format(type=isa.type, bits=bits)}")


def run_mca(mca: str, chip: Chip, isa: Isa, loop: InnerLoop) -> tuple[float, float]:
    """Cycles of a turn: stepped through, and the bound by ports and dispatch."""
    command = [
        mca,
        f"-mtriple={isa.architecture}",
        f"-mcpu={chip.mcpu}",
        f"-iterations={ITERATIONS}",
        "--json",
    ]
    if chip.dispatch is not None:
        command.append(f"-dispatch={chip.dispatch}")
    text = "\n".join(map(str, loop.instructions))
    run = subprocess.run(command, input=text, capture_output=True, text=True)
    if run.returncode != 0:
        raise LoopError(f"llvm-mca: {run.stderr.strip()}")
    summary = json.loads(run.stdout)["CodeRegions"][0]["SummaryView"]
    return summary["TotalCycles"] / summary["Iterations"], float(summary["BlockRThroughput"])


def find_mca(wanted: str | None) -> tuple[str, str]:
    """The program and its version: the newest that is installed unless one is named."""
    names = [f"llvm-mca-{n}" for n in range(99, OLDEST_LLVM - 1, -1)] + ["llvm-mca"]
    for name in [wanted] if wanted else names:
        if path := shutil.which(name):
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"LLVM version (\d+)[.\d]*", text)
            if version and int(version[1]) >= OLDEST_LLVM:
                return path, version[0]
            raise FileNotFoundError(
                f"{path} has no model of these chips: LLVM {OLDEST_LLVM} or later is needed"
            )
    raise FileNotFoundError(
        f"{wanted or 'llvm-mca'} not found: install LLVM {OLDEST_LLVM} or later (llvm-19)"
    )


def measure(mca: str, bits: Sequence[int]) -> Iterator[Row | str]:
    """Rows in the order of the report; what failed, as a message in its place."""
    rows = isas()
    for chip in CHIPS:
        if chip.isa not in rows:
            continue
        isa = rows[chip.isa]
        code = compile_kernels(isa)
        for b in bits:
            for kernel in SYMBOLS:
                try:
                    loop = loop_of(code, isa, kernel, b)
                    cycles, bound = run_mca(mca, chip, isa, loop)
                except LoopError as error:
                    yield f"{chip.isa}, {b} bits, {kernel}: {error}"
                    continue
                yield Row(
                    chip=chip.name,
                    isa=chip.isa,
                    bits=b,
                    kernel=kernel,
                    nbytes=loop.nbytes,
                    instructions=len(loop.instructions),
                    cycles=cycles,
                    bound=bound,
                )


def markdown(rows: Sequence[Row], tools: Sequence[str]) -> str:
    """The report: a table for each chip and instruction set."""
    parts = [
        "Cycles per byte of packed weights and, in brackets, weights per cycle: one token, one "
        "thread, the loop over regions of 64 weights with the conversion of their sums to floats. "
        "Multiplying is with 8-bit activations; the last column is the speed of int8 tables over "
        f"it (above 1, tables win). {', '.join(tools)}.",
    ]
    for chip, isa in dict.fromkeys((row.chip, row.isa) for row in rows):
        mine = {(row.bits, row.kernel): row for row in rows if (row.chip, row.isa) == (chip, isa)}
        lines = [
            f"**{chip}, `{isa}`**",
            "",
            "| bits | int8 tables | exact tables | multiply | int8 / multiply |",
            "|---|---|---|---|---|",
        ]
        for bits in dict.fromkeys(b for b, _ in mine):
            cells = [_cell(mine.get((bits, kernel))) for kernel in SYMBOLS]
            int8, multiply = mine.get((bits, "int8")), mine.get((bits, "multiply"))
            ratio = (
                f"{multiply.cycles_per_byte / int8.cycles_per_byte:.2f}"
                if (int8 and multiply)
                else "-"
            )
            lines.append(f"| {bits} | {' | '.join(cells)} | {ratio} |")
        parts.append("\n".join(lines))
    parts.append(
        "llvm-mca takes every load for a hit in the first-level cache and every branch for "
        "predicted: it knows neither memory nor prefetching, and no address conflicts or store "
        "forwarding. The ends of weight groups (scales) and the building of tables are left out, "
        "on both sides. Its Cortex-A72 is LLVM's model of Cortex-A57, its Cortex-A76 that of "
        "Neoverse N1."
    )
    return "\n\n".join(parts) + "\n"


def _cell(row: Row | None) -> str:
    return f"{row.cycles_per_byte:.3f} ({row.weights_per_cycle:.1f})" if row else "-"


def as_json(rows: Sequence[Row], tools: Sequence[str]) -> dict[str, Any]:
    """The report as one object."""
    return {
        "tools": list(tools),
        "rows": [
            {
                **asdict(row),
                "cycles_per_byte": row.cycles_per_byte,
                "weights_per_cycle": row.weights_per_cycle,
            }
            for row in rows
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status, 1 if a loop could not be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llvm-mca", metavar="PROGRAM", help="(default: the newest installed)")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=BITS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    rows: list[Row] = []
    status = 0
    try:
        mca, version = find_mca(args.llvm_mca)
        for row in measure(mca, args.bits):
            if isinstance(row, Row):
                rows.append(row)
            else:
                print(row, file=sys.stderr)
                status = 1
        tools = [version, _compiler_version()]
    except (OSError, subprocess.CalledProcessError) as error:
        parser.exit(2, f"error: {error}\n")
    table = markdown(rows, tools)
    if args.output is not None:
        args.output.write_text(table)
    print(json.dumps(as_json(rows, tools), indent=2) if args.json else table.rstrip())
    return status


def _compiler_version() -> str:
    compiler = next(iter(isa.compiler for isa in isas().values() if isa.architecture == "aarch64"))
    run = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True)
    return f"GCC {run.stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
