"""The inner loops that bench/inner_loops.py cuts out of assembly, on small pieces of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

from inner_loops import Row, isas, markdown, region_bytes  # noqa: E402
from inner_loops_assembly import LoopError, functions, inner_loop  # noqa: E402

# Two bits, one part: a loop over regions (.L2) around one over chunks (.L3) that takes two chunks
# with prefetching or one without, and a loop over scales (.L9) after it. The pointer of the codes
# grows by a constant that either side leaves in a register.
X86 = """
	.text
	.type	other, @function
other:
	vpshufb	%ymm1, %ymm2, %ymm3
	ret
	.size	other, .-other
	.p2align 4
	.type	kernel, @function
kernel:
.LFB1:
	.cfi_startproc
	vpxor	%xmm0, %xmm0, %xmm0
.L2:
	movl	$8, %r8d
	vmovdqa	%ymm0, 32(%rsp)
	.p2align 4,,10
.L3:
	cmpq	$1, %r8
	jle	.L5
	prefetcht0	2048(%r12)
	vbroadcasti128	(%rax), %ymm9
	vmovdqu	(%r12), %ymm1
	vpsrlw	$4, %ymm1, %ymm2
	vpand	(%r12), %ymm15, %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm2, %ymm9, %ymm2
	vmovdqu	32(%r12), %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm2, %ymm9, %ymm2
	vmovdqu	64(%r12), %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm2, %ymm9, %ymm2
	vmovdqu	96(%r12), %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm2, %ymm9, %ymm2
	addq	$64, %rax
	movl	$128, %ecx
	subq	$2, %r8
.L4:
	addq	%rcx, %r12
	testq	%r8, %r8
	jne	.L3
	vmovdqa	32(%rsp), %ymm4
	vcvtdq2ps	%ymm4, %ymm4
	vfmadd231ps	%ymm4, %ymm5, %ymm6
	subq	$1, %rdx
	jne	.L2
	jmp	.L9
.L5:
	vmovdqu	(%r12), %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm1, %ymm9, %ymm2
	vmovdqu	32(%r12), %ymm1
	vpshufb	%ymm1, %ymm9, %ymm1
	vpshufb	%ymm1, %ymm9, %ymm2
	movl	$64, %ecx
	subq	$1, %r8
	jmp	.L4
.L9:
	vcvtph2ps	(%r12), %ymm1
	subq	$1, %rsi
	jne	.L9
	vzeroupper
	ret
	.cfi_endproc
	.size	kernel, .-kernel
"""

# One bit, one part, the whole region in one turn; loads of all forms.
ARM = """
	.type	kernel, %function
kernel:
.L2:
	mov	x3, 128
	add	x4, x2, 32
	ldp	q1, q2, [x2]
	prfm	PLDL1KEEP, [x2, 2048]
	ldr	q3, [x4]
	ldr	q4, [x4, 16]
	ld1	{v5.16b - v8.16b}, [x9], 64
	add	x2, x2, x3
	ldr	q16, [x2, -64]
	ldp	q17, q18, [x2, -48]
	ldr	q19, [x2, -16]
	{lookups}
	ld1r	{v30.4s}, [x7]
	scvtf	v20.4s, v20.4s
	cmp	x2, x5
	bne	.L2
	ret
	.size	kernel, .-kernel
"""


def arm(lookups: int) -> list[str]:
    text = "\n\t".join(["tbl\tv20.16b, {v9.16b}, v1.16b"] * lookups)
    return functions(ARM.replace("{lookups}", text))["kernel"]


def test_the_loop_over_regions_is_written_out() -> None:
    loop = inner_loop(functions(X86)["kernel"], lookups_of_a_byte=2, region_bytes=512)
    mnemonics = [instruction.mnemonic for instruction in loop.instructions]
    assert loop.nbytes == 512
    assert mnemonics.count("prefetcht0") == 4, "the side that prefetches, four times"
    assert mnemonics.count("vpshufb") == 4 * 8
    assert mnemonics.count("vcvtdq2ps") == 1
    assert "vcvtph2ps" not in mnemonics, "what follows the regions"
    assert mnemonics[0] == "movl"
    assert mnemonics[-1] == "jne"
    assert str(loop.instructions[1]) == "\tvmovdqa\t%ymm0, 32(%rsp)"


def test_regions_that_turns_do_not_divide() -> None:
    with pytest.raises(LoopError, match="128 bytes a turn do not divide 500"):
        inner_loop(functions(X86)["kernel"], lookups_of_a_byte=2, region_bytes=500)


def test_lookups_must_agree_with_loads() -> None:
    missing = X86.replace("\tvmovdqu\t64(%r12), %ymm1\n", "")
    with pytest.raises(LoopError, match="512 bytes by count"):
        inner_loop(functions(missing)["kernel"], lookups_of_a_byte=2, region_bytes=512)


def test_arm_loads() -> None:
    loop = inner_loop(arm(16), lookups_of_a_byte=2, region_bytes=128)
    assert loop.nbytes == 128
    assert len(loop.instructions) == 15 + 16


def test_arm_lookups_must_agree_with_loads() -> None:
    with pytest.raises(LoopError, match=r"112 bytes by count, .* have \[64, 128\]"):
        inner_loop(arm(14), lookups_of_a_byte=2, region_bytes=128)


def test_a_kernel_that_multiplies_does_whole_regions() -> None:
    lines = functions(X86.replace("vpshufb", "vpmaddubsw"))["kernel"]
    assert inner_loop(lines, lookups_of_a_byte=0, region_bytes=512).nbytes == 512


def test_loops_that_call() -> None:
    outlined = X86.replace("\tprefetcht0", "\tcall\tadd.constprop.0\n\tprefetcht0")
    with pytest.raises(LoopError, match=r"not inlined, it calls add\.constprop\.0$"):
        inner_loop(functions(outlined)["kernel"], lookups_of_a_byte=2, region_bytes=512)


def test_functions_without_such_a_loop() -> None:
    with pytest.raises(LoopError, match="no loop does the work"):
        inner_loop(functions(X86)["other"], lookups_of_a_byte=2, region_bytes=512)


def test_rows_of_the_build() -> None:
    rows = isas()
    assert rows["neon"].compiler == "aarch64-linux-gnu-g++"
    assert "-mavx2" in rows["avx2"].flags
    assert region_bytes(2) == 512


def test_report() -> None:
    def row(kernel: str, cycles: float) -> Row:
        return Row("Chip", "neon", 2, kernel, 512, 100, cycles, cycles)  # type: ignore[arg-type]

    text = markdown([row("int8", 128), row("multiply", 192)], ["LLVM version 19"])
    assert "**Chip, `neon`**" in text
    assert "| 2 | 0.250 (16.0) | - | 0.375 (10.7) | 1.50 |" in text
