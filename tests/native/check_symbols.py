"""check_symbols.py BUILD_FOLDER [NM]: each object of an ISA defines one symbol for the linker.

The products are kKernels_ISA, the float work is kVectorKernels_ISA.

Anything else, an inline function of the standard library for example, would be compiled with the
flags of that ISA, and the linker could pick it for code that has to run on any CPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TABLES = {"isa": "kKernels", "vector_isa": "kVectorKernels"}
"""What each source that is compiled for every ISA defines."""


def defined_symbols(path: Path, nm: str) -> list[str]:
    """Names that an object file shows to the linker."""
    command = [nm, "--extern-only", "--defined-only", "--format=posix", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[0] for line in lines]


def main() -> int:
    """Exit status 1 if an object defines other symbols, or if there are no objects."""
    build, nm = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "nm"
    objects = sorted(build.glob("**/tmac_isa_*.dir/**/*.o"))
    failures = [] if objects else [f"{build} holds no object of an ISA"]
    for path in objects:
        isa = next(p for p in path.parts if p.startswith("tmac_isa_"))
        isa = isa.removeprefix("tmac_isa_").removesuffix(".dir")
        symbols = defined_symbols(path, nm)
        table = f"{TABLES[path.name.partition('.')[0]]}_{isa}"
        if len(symbols) != 1 or table not in symbols[0]:
            failures.append(f"{path.name}: the only symbol must be {table}, not {symbols}")
    print("\n".join(failures) or f"{len(objects)} objects, one symbol each")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
