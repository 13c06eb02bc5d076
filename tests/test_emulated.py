"""The cases of test_kernels.py, and the float operations, in the stand-alone program.

It reaches instruction sets that only an emulator offers, and builds with sanitizers. TMAC_SELFTEST
names the programs to run (see CONTRIBUTING.md); .ci/run builds them and sets it.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attention_cases import alone, attention_cases
from kernel_cases import (
    BCQ,
    BITS,
    KINDS,
    TABLES,
    all_cases,
    integer_matrix,
    invariance_cases,
    pieces,
)
from selftest_program import (
    VARIABLE,
    call,
    programs,
    run_layout,
    run_linear,
    run_vectors,
    usable_isas,
)
from vector_cases import vector_cases

PROGRAMS = programs()


def kernels_once() -> list[tuple[str, str]]:
    """Programs with their instruction sets; each of a file only on the first CPU that has it."""
    chosen: dict[tuple[str, str], str] = {}
    for program in PROGRAMS:
        for isa in usable_isas(program):
            chosen.setdefault((shlex.split(program)[-1], isa), program)
    return [(program, isa) for (_, isa), program in chosen.items()]


pytestmark = pytest.mark.skipif(
    not PROGRAMS, reason=f"{VARIABLE} names no program (.ci/run builds them and sets it)"
)


@pytest.mark.parametrize(("program", "isa"), kernels_once())
class TestIsa:
    @pytest.mark.parametrize("tables", TABLES)
    @pytest.mark.parametrize("bits", [*BITS, *BCQ])
    def test_products(self, program: str, isa: str, tables: str, bits: int, tmp_path: Path) -> None:
        cases = all_cases(tables, bits)
        for case, y in zip(cases, run_linear(program, isa, cases, tmp_path), strict=True):
            case.check(y)

    @pytest.mark.parametrize("tables", TABLES)
    @pytest.mark.parametrize("bits", [*BITS, *BCQ])
    def test_threads_and_tokens_change_no_bit(
        self, program: str, isa: str, tables: str, bits: int, tmp_path: Path
    ) -> None:
        for case in invariance_cases(tables, bits):
            cases = [replace(case, threads=threads) for threads in (1, 2, 3, 5)]
            first, *others = run_linear(program, isa, cases, tmp_path)
            case.check(first)
            for y in others:
                assert y.tobytes() == first.tobytes()
            apart = run_linear(program, isa, pieces(case), tmp_path)
            assert np.concatenate(apart).tobytes() == first.tobytes()

    def test_float_operations(self, program: str, isa: str, tmp_path: Path) -> None:
        cases = vector_cases() + attention_cases()
        for case, got in zip(cases, run_vectors(program, isa, cases, tmp_path), strict=True):
            case.check(got)

    def test_queries_get_together_what_they_get_alone(
        self, program: str, isa: str, tmp_path: Path
    ) -> None:
        for case in attention_cases():
            if case.fields[4] > 1:
                (together,) = run_vectors(program, isa, [case], tmp_path)
                apart = run_vectors(program, isa, alone(case), tmp_path)
                assert np.concatenate(apart).tobytes() == together.tobytes(), case.name


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", [*BITS, *BCQ])
def test_every_program_and_isa_gives_the_same_bits(tables: str, bits: int, tmp_path: Path) -> None:
    for case in invariance_cases(tables, bits):
        results = {
            run_linear(program, isa, [case], tmp_path)[0].tobytes()
            for program in PROGRAMS
            for isa in usable_isas(program)
        }
        assert len(results) == 1


def test_every_program_and_isa_attends_with_the_same_bits(tmp_path: Path) -> None:
    cases = attention_cases()
    results = [
        [np.nan_to_num(y, nan=-1.0).tobytes() for y in run_vectors(program, isa, cases, tmp_path)]
        for program in PROGRAMS
        for isa in usable_isas(program)
    ]
    for case, *of_case in zip(cases, *results, strict=True):
        assert len(set(of_case)) == 1, case.name


@pytest.mark.parametrize("program", PROGRAMS)
class TestProgram:
    @pytest.mark.parametrize(
        ("bits", "kind"),
        [*itertools.product(BITS, KINDS), *((bits, "offset") for bits in BCQ)],
    )
    def test_layout(self, program: str, kind: str, bits: int, tmp_path: Path) -> None:
        rng = np.random.default_rng(abs(bits))
        for m, k, group_size in ((33, 37, 20), (1, 1, 1), (64, 256, 48)):
            q = integer_matrix(rng, m, k, bits, group_size, kind)  # type: ignore[arg-type]
            codes, scales, offsets, weights = run_layout(program, q, tmp_path)
            np.testing.assert_array_equal(codes, q.codes)
            for got, want in ((scales, q.scales), (offsets, q.offsets)):
                np.testing.assert_array_equal(got, [] if want is None else want.ravel())
            np.testing.assert_array_equal(weights, q.dequantize())  # all integers times 2^i

    def test_thread_pool_under_stress(self, program: str) -> None:
        call(program, "stress", "100")

    def test_mistakes_are_told(self, program: str, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="'mmx' is not an instruction set"):
            call(program, "run", "mmx", "cases", "results")
        (tmp_path / "cases").write_bytes(b"\x03\0\0\0\0\0\0\0add\x05")
        with pytest.raises(AssertionError, match="cut short"):
            call(program, "run", "scalar", str(tmp_path / "cases"), str(tmp_path / "results"))
