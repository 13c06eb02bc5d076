"""Finds the inner loop of a kernel in the compiler's assembly: x86 (AT&T syntax) and AArch64, GCC.

The code of a function is cut into blocks at labels and branches. Of the loops that end with sums
becoming floats, the innermost one that looks up (or multiplies) is the work on one region of
weights; loops within it are written out as often as the region needs. Where the loop forks, the
side that prefetches is the one that whole regions take, and among equals the one that looks up
more, then the shorter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LOOKUP = re.compile(r"v?pshufb|vperm[bi].*|tbl")
MULTIPLY = re.compile(r"vpmaddubsw|vpmaddwd|vpdpbusds?|smull2?|smlal2?|[su]dot")
CONVERSION = re.compile(r"v?cvtdq2ps|scvtf")
PREFETCH = re.compile(r"prefetch.*|prfm")

_CONDITIONS = "eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|any|none"
_FORK = re.compile(rf"j(?!mp).*|b\.?({_CONDITIONS})|cbn?z|tbn?z")
_JUMP = re.compile(r"jmp|b")
_CALL = re.compile(r"callq?|blr?")
_END = re.compile(r"ret|retq|br|ud2|brk")
_X86_REGISTER = re.compile(r"[re]?(ax|bx|cx|dx|si|di|bp|sp|[0-9]+[dwb]?)l?")
_WIDTHS = {"b": 1, "h": 2, "s": 4, "d": 8, "q": 16, "xmm": 16, "ymm": 32, "zmm": 64}
_PARTIAL_LOAD = re.compile(r"v?(p?broadcast.*|pmov[sz]x.*|mov[dq]|.*ss|.*sd|cvtph2ps)|ld[1-4]r")
_STACK = frozenset(("sp", "bp", "x29"))

# A sum of registers as they were on entry (times integers) and a constant, under "".
Value = Mapping[str, int]


class LoopError(ValueError):
    """The assembly does not look as expected."""


@dataclass(frozen=True)
class Instruction:
    """One line: `vpaddw %ymm0, %ymm1, %ymm2` with its operands in the order of the text."""

    mnemonic: str
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Instruction:
        """From a line that is neither a label nor a directive."""
        mnemonic, _, rest = line.strip().partition("\t")
        if mnemonic.startswith("{"):  # {vex} vpdpbusd
            prefix, _, mnemonic = mnemonic.partition(" ")
            if not mnemonic:
                mnemonic, _, rest = rest.partition("\t")
            mnemonic = f"{prefix} {mnemonic.strip()}"
        operands = re.split(r",\s*(?![^(\[{]*[)\]}])", rest.strip()) if rest.strip() else []
        return cls(mnemonic.strip(), tuple(operands))

    def is_a(self, kind: re.Pattern[str]) -> bool:
        """Whether the mnemonic is of a kind."""
        return kind.fullmatch(self.mnemonic.rpartition(" ")[2]) is not None

    def __str__(self) -> str:
        return f"\t{self.mnemonic}\t{', '.join(self.operands)}"


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    labels: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, kind: re.Pattern[str]) -> int:
        """Instructions of a kind."""
        return sum(instruction.is_a(kind) for instruction in self.instructions)


@dataclass(frozen=True)
class InnerLoop:
    """The work on one region (or on the fewer weights at whose end the kernel makes floats)."""

    instructions: tuple[Instruction, ...]
    nbytes: int  # of packed weights


def functions(assembly: str) -> dict[str, list[str]]:
    """The lines of every function by its symbol, without directives."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    names = set(re.findall(r"^\s*\.type\s+([^\s,]+),\s*[@%]function", assembly, re.MULTILINE))
    for line in assembly.splitlines():
        label = re.match(r"([^\s:]+):", line)
        if label and label[1] in names:
            lines = found.setdefault(label[1], [])
        elif line.lstrip().startswith(".size"):
            lines = None
        elif lines is not None and line.strip() and (label or not re.match(r"\s*[.#/]", line)):
            lines.append(line)
    return found


def blocks_of(lines: Iterable[str]) -> list[Block]:
    """The blocks of one function in the order of the text, joined to those that may follow."""
    blocks = [Block([])]
    for line in lines:
        if label := re.match(r"([^\s:]+):", line):
            if blocks[-1].instructions:
                blocks.append(Block([]))
            blocks[-1].labels.append(label[1])
            continue
        instruction = Instruction.parse(line)
        blocks[-1].instructions.append(instruction)
        if any(map(instruction.is_a, (_FORK, _JUMP, _END))):
            blocks.append(Block([]))
    by_label = {label: i for i, block in enumerate(blocks) for label in block.labels}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last and (last.is_a(_FORK) or last.is_a(_JUMP)):
            block.next += [by_label[o] for o in last.operands[-1:] if o in by_label]
        if not (last and (last.is_a(_JUMP) or last.is_a(_END))) and i + 1 < len(blocks):
            block.next.append(i + 1)
    return blocks


def _loops(blocks: Sequence[Block]) -> dict[int, frozenset[int]]:
    """The blocks of every natural loop by its first block."""
    reached = [0]
    for i in reached:
        reached += [n for n in blocks[i].next if n not in reached]
    dominators = {i: set(reached) for i in reached}
    dominators[0] = {0}
    before: dict[int, list[int]] = {i: [] for i in reached}
    for i in reached:
        for n in blocks[i].next:
            before[n].append(i)
    changed = True
    while changed:
        changed = False
        for i in reached[1:]:
            new = {i}.union(set.intersection(*(dominators[b] for b in before[i])))
            changed |= new != dominators[i]
            dominators[i] = new
    loops: dict[int, frozenset[int]] = {}
    for latch in reached:
        for head in set(blocks[latch].next) & dominators[latch]:
            body, todo = {head}, [latch]
            while todo:
                if (i := todo.pop()) not in body:
                    body.add(i)
                    todo += before[i]
            loops[head] = loops.get(head, frozenset()) | body
    return loops


def _best_turn(
    blocks: Sequence[Block], loops: Mapping[int, frozenset[int]], head: int, work: re.Pattern[str]
) -> list[int]:
    """The blocks of one turn of a loop, loops within it entered once."""
    body = loops[head]

    def weight(path: Sequence[int]) -> tuple[int, int, int]:
        return (
            sum(blocks[i].count(PREFETCH) for i in path),
            sum(blocks[i].count(work) for i in path),
            -sum(len(blocks[i].instructions) for i in path),
        )

    best: dict[int, list[int] | None] = {}

    def follow(i: int) -> list[int] | None:  # the best way from i back to the head
        if i not in best:
            ways: list[list[int]] = []
            for n in blocks[i].next:
                if n == head:
                    ways.append([i])
                elif n in body and not (n in loops and i in loops[n]) and (rest := follow(n)):
                    ways.append([i, *rest])
            best[i] = max(ways, key=weight, default=None)
        return best[i]

    turn = follow(head)
    if turn is None:
        raise LoopError("a loop without a way back to its first block")
    return turn


def find_loop(lines: Iterable[str], *, work: re.Pattern[str]) -> tuple[list[Block], list[bool]]:
    """The blocks of one region's work in order, and whether each repeats until it is done."""
    blocks = blocks_of(lines)
    loops = _loops(blocks)
    turns = {head: _best_turn(blocks, loops, head, work) for head in loops}

    def count(turn: Iterable[int], kind: re.Pattern[str]) -> int:
        return sum(blocks[i].count(kind) for i in turn)

    whole = [h for h, turn in turns.items() if count(turn, work) and count(turn, CONVERSION)]
    if prefetching := [h for h in whole if count(turns[h], PREFETCH)]:
        whole = prefetching
    whole = [h for h in whole if not any(o != h and loops[o] < loops[h] for o in whole)]
    if not whole:
        called = _called(instruction for block in blocks for instruction in block.instructions)
        raise LoopError(
            "no loop does the work and ends in floats"
            + (f"; the function calls {called}" if called else "")
        )
    # A function with loops for several tokens and for one: the one with the fewest lookups.
    head = min(whole, key=lambda h: count(turns[h], work))
    inner = [h for h in turns if h != head and loops[h] < loops[head] and count(turns[h], work)]
    inner = [h for h in inner if not any(loops[h] < loops[o] for o in inner if o != h)]
    ordered: list[Block] = []
    repeats: list[bool] = []
    written: set[int] = set()
    for i in turns[head]:
        loop = next((h for h in inner if i in loops[h]), None)
        if loop is None:
            ordered.append(blocks[i])
            repeats.append(False)
        elif loop not in written:
            if any(h != loop and loops[h] < loops[loop] for h in turns):
                raise LoopError("loops within loops within the loop over regions")
            written.add(loop)
            ordered += [blocks[b] for b in turns[loop]]
            repeats += [True] * len(turns[loop])
    return ordered, repeats


def inner_loop(lines: Iterable[str], *, lookups_of_a_byte: int, region_bytes: int) -> InnerLoop:
    """One region's work in the function of these lines.

    A packed byte is looked up `lookups_of_a_byte` times; 0 for a kernel that multiplies, which has
    nothing to tell its bytes by and is taken to do whole regions. Raises LoopError unless the loads
    from one stream cover exactly the bytes so counted.
    """
    work = LOOKUP if lookups_of_a_byte else MULTIPLY
    lines = list(lines)
    blocks, repeats = find_loop(lines, work=work)
    if called := _called(instruction for b in blocks for instruction in b.instructions):
        raise LoopError(f"the loop is not inlined, it calls {called}")
    straight = [i for b, r in zip(blocks, repeats, strict=True) if not r for i in b.instructions]
    repeated = [i for b, r in zip(blocks, repeats, strict=True) if r for i in b.instructions]

    def write_out(times: int) -> tuple[Instruction, ...]:
        written: list[Instruction] = []
        i = 0
        while i < len(blocks):
            end = i + 1
            while repeats[i] and end < len(blocks) and repeats[end]:
                end += 1
            body = [instruction for b in blocks[i:end] for instruction in b.instructions]
            written += body * (times if repeats[i] else 1)
            i = end
        return tuple(written)

    if lookups_of_a_byte:
        each = _looked_up(repeated) // lookups_of_a_byte
        once = _looked_up(straight) // lookups_of_a_byte
        times, rest = divmod(region_bytes - once, each) if each else (1, 0)
        if rest or times < 1:
            raise LoopError(f"{each} bytes a turn do not divide {region_bytes - once}")
        instructions, nbytes = write_out(times), once + times * each
    else:
        candidates = range(1, 65) if repeated else range(1, 2)
        nbytes = region_bytes
        instructions = next(
            (w for w in map(write_out, candidates) if nbytes in loaded_bytes(w).values()), ()
        )
    if nbytes not in loaded_bytes(instructions).values():
        raise LoopError(
            f"{nbytes} bytes by count, but the streams that are loaded have "
            f"{sorted(loaded_bytes(instructions).values())}"
        )
    return InnerLoop(instructions, nbytes)


def _called(instructions: Iterable[Instruction]) -> str:
    """The functions that are called, each once."""
    calls = (instruction for instruction in instructions if instruction.is_a(_CALL))
    return ", ".join(dict.fromkeys(", ".join(call.operands) for call in calls))


def _looked_up(instructions: Iterable[Instruction]) -> int:
    """Bytes of all results of lookups."""
    total = 0
    for instruction in instructions:
        if instruction.is_a(LOOKUP):
            vector = re.search(r"%([xyz]mm)|\.(8|16)b", " ".join(instruction.operands))
            if vector is None:
                raise LoopError(f"a lookup without vectors: {instruction}")
            total += _WIDTHS[vector[1]] if vector[1] else int(vector[2])
    return total


def loaded_bytes(instructions: Iterable[Instruction]) -> dict[frozenset[tuple[str, int]], int]:
    """Bytes that whole-vector loads cover, by the registers that their addresses grow from.

    Streams with gaps and the stack are left out.
    """
    covered: dict[frozenset[tuple[str, int]], set[tuple[int, int]]] = {}
    for address, nbytes in _Registers().loads(instructions):
        stream = frozenset((name, n) for name, n in address.items() if name and n)
        if not any(name in _STACK for name, _ in stream):
            start = address.get("", 0)
            covered.setdefault(stream, set()).add((start, start + nbytes))
    totals = {}
    for stream, spans in covered.items():
        ordered = sorted(spans)
        end = ordered[0][0]
        for start, stop in ordered:
            if start > end:
                break
            end = max(end, stop)
        else:
            totals[stream] = end - ordered[0][0]
    return totals


class _Registers:
    """Follows the general registers through straight code."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._unknown = 0

    def loads(self, instructions: Iterable[Instruction]) -> Iterable[tuple[Value, int]]:
        """The address and bytes of every load of a whole vector."""
        for instruction in instructions:
            x86 = "%" in " ".join(instruction.operands)
            step: Callable[[Instruction], Iterable[tuple[Value, int]]]
            step = self._x86 if x86 else self._arm
            yield from step(instruction)

    def _get(self, register: str) -> Value:
        return self._values.get(register, {register: 1})

    def _forget(self, register: str) -> None:
        self._unknown += 1
        self._values[register] = {f"?{self._unknown}": 1}

    def _x86(self, instruction: Instruction) -> Iterable[tuple[Value, int]]:
        name, operands = instruction.mnemonic.rpartition(" ")[2], instruction.operands
        vector = re.search(r"%([xyz]mm)", " ".join(operands))
        # AT&T: the destination comes last; memory there is a store.
        for operand in operands[:-1] if len(operands) > 1 else ():
            memory = re.fullmatch(r"(-?\w*)\(([^)]*)\)", operand)
            if memory and vector and not _PARTIAL_LOAD.fullmatch(name):
                yield self._x86_address(memory[1], memory[2]), _WIDTHS[vector[1]]
        target = _x86_name(operands[-1]) if operands else None
        if target is None or name.startswith(("cmp", "test", "j", "prefetch")):
            return
        source = operands[0] if len(operands) == 2 else ""
        wide = operands[-1].startswith("%r") and not operands[-1].endswith(("d", "w", "b"))
        constant = re.fullmatch(r"\$(-?\d+)", source)
        register = _x86_name(source)
        memory = re.fullmatch(r"(-?\w*)\(([^)]*)\)", source)
        old = self._get(target)
        if name in ("movl", "movq") and constant:
            self._values[target] = {"": int(constant[1])}
        elif not wide:
            self._forget(target)
        elif name in ("addq", "subq") and (constant or register):
            value = {"": int(constant[1])} if constant else self._get(register or "")
            self._values[target] = _sum(old, value, 1 if name == "addq" else -1)
        elif name == "movq" and register:
            self._values[target] = self._get(register)
        elif name == "salq" and constant:
            self._values[target] = _sum({}, old, 1 << int(constant[1]))
        elif name == "leaq" and memory:
            self._values[target] = self._x86_address(memory[1], memory[2])
        else:
            self._forget(target)

    def _x86_address(self, displacement: str, inside: str) -> Value:
        base, index, scale = [*inside.split(","), "", ""][:3]
        value: Value = {"": int(displacement or "0", 0)} if _is_integer(displacement) else {}
        for text, factor in ((base, 1), (index, int(scale or 1))):
            if register := _x86_name(text.strip()):
                value = _sum(value, self._get(register), factor)
        return value

    def _arm(self, instruction: Instruction) -> Iterable[tuple[Value, int]]:
        name, operands = instruction.mnemonic, instruction.operands
        place = next((i for i, o in enumerate(operands) if o.startswith("[")), None)
        if place is not None:
            inside = re.split(r",\s*", operands[place].strip("[]!"))
            base, shifted = inside[0], self._arm_sum(inside[1:])
            address = (
                self._get(base) if place + 1 < len(operands) else _sum(self._get(base), shifted, 1)
            )
            whole = name.startswith("ld") and not _PARTIAL_LOAD.fullmatch(name)
            if whole and (nbytes := _arm_width(operands[:place])):
                yield address, nbytes
            if name.startswith("ld"):
                for target in operands[:place]:
                    if re.fullmatch(r"[wx]\d+", target):
                        self._forget(target.replace("w", "x"))
            if place + 1 < len(operands):  # [x0], 16
                self._values[base] = _sum(self._get(base), self._arm_sum(operands[place + 1 :]), 1)
            elif operands[place].endswith("!"):  # [x0, 16]!
                self._values[base] = address
            return
        if not operands or name.startswith(("cmp", "ccmp", "tst", "cb", "tb")):
            return
        target = operands[0]
        if not re.fullmatch(r"[wx]\d+", target):
            return
        if name == "mov" and re.fullmatch(r"(x|#?-?)\d+", operands[1]):
            self._values[target.replace("w", "x")] = self._arm_sum(operands[1:])
        elif name == "lsl" and target.startswith("x") and re.fullmatch(r"#?\d+", operands[2]):
            shifted = self._get(operands[1])
            self._values[target] = _sum({}, shifted, 1 << int(operands[2].lstrip("#")))
        elif target.startswith("w") or name not in ("add", "sub"):
            self._forget(target.replace("w", "x"))
        else:
            self._values[target] = _sum(
                self._get(operands[1]),
                self._arm_sum(operands[2:]),
                1 if name == "add" else -1,
            )

    def _arm_sum(self, parts: Sequence[str]) -> Value:
        """`16`, `#16`, `x1` or `x1, lsl 4`."""
        if not parts:
            return {}
        if _is_integer(parts[0].lstrip("#")):
            return {"": int(parts[0].lstrip("#"), 0)}
        shift = re.fullmatch(r"lsl #?(\d+)", parts[1]) if len(parts) > 1 else None
        if not re.fullmatch(r"x\d+", parts[0]) or (len(parts) > 1 and shift is None):
            self._unknown += 1
            return {f"?{self._unknown}": 1}
        return _sum({}, self._get(parts[0]), 1 << int(shift[1]) if shift else 1)


def _sum(a: Value, b: Value, factor: int) -> Value:
    return {name: a.get(name, 0) + factor * b.get(name, 0) for name in {**a, **b}}


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?(0x[0-9a-f]+|\d+)|", text) is not None and text != "-"


def _x86_name(operand: str) -> str | None:
    """`%rsi` and `%esi` are both "si"; None for anything but a general register."""
    if not operand.startswith("%"):
        return None
    match = _X86_REGISTER.fullmatch(operand[1:])
    return None if match is None else re.sub(r"(?<=\d)[dwb]$", "", match[1])


def _arm_width(targets: Sequence[str]) -> int:
    """Bytes of vector registers: q0 and q1, or {v0.16b - v3.16b}."""
    total = 0
    for target in targets:
        if scalar := re.fullmatch(r"([qd])\d+", target):
            total += _WIDTHS[scalar[1]]
        elif several := re.fullmatch(r"\{\s*v(\d+)\.16b(?:\s*-\s*v(\d+)\.16b)?\s*\}", target):
            total += 16 * (int(several[2] or several[1]) - int(several[1]) + 1)
        elif target.startswith("{"):
            total += 16 * len(re.findall(r"v\d+\.16b", target))
    return total
