"""Running cases in the program tests/native/selftest.cc, natively or under an emulator."""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel_cases import TABLES, LinearCase
from tmac_py.quant import QuantTensor
from vector_cases import VectorCase

VARIABLE = "TMAC_SELFTEST"

OFFSET_KINDS = ("none", "offset", "zero")
"""In the order of the core's enum OffsetKind."""

ENCODINGS = ("uniform", "ternary", "bcq")
"""In the order of the core's enum Encoding."""

Part = int | float | str | NDArray[Any]


def programs() -> list[str]:
    """The commands in $TMAC_SELFTEST, separated by semicolons: the path of the program, after an
    emulator and its options where one is needed."""
    commands = os.environ.get(VARIABLE, "").split(";")
    return [command.strip() for command in commands if command.strip()]


def call(program: str, *arguments: str) -> str:
    """What the program prints. Raises AssertionError with its complaint if it fails."""
    command = [*shlex.split(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"
    return done.stdout


def usable_isas(program: str) -> list[str]:
    return call(program, "isas").split()


def encode(*parts: Part) -> bytes:
    """One record of a file of cases."""
    encoded = b""
    for part in parts:
        if isinstance(part, str):
            encoded += struct.pack("<q", len(part)) + part.encode()
        elif isinstance(part, np.ndarray):
            encoded += part.tobytes()
        else:
            encoded += struct.pack("<q" if isinstance(part, int) else "<f", part)
    return encoded


def matrix(q: QuantTensor) -> list[Part]:
    shape: list[Part] = [q.m, q.k, q.bits, ENCODINGS.index(q.encoding), q.group_size]
    kind: list[Part] = [OFFSET_KINDS.index(q.offset_kind), float(q.zero)]
    kind += [int(q.scale is not None), q.scale or 0.0]
    arrays: list[Part] = [q.codes]
    arrays += [stored for stored in (q.scales, q.offsets) if stored is not None]
    return shape + kind + arrays


def run(program: str, isa: str, records: Sequence[bytes], folder: Path) -> bytes:
    cases, results = folder / "cases", folder / "results"
    cases.write_bytes(b"".join(records))
    call(program, "run", isa, str(cases), str(results))
    return results.read_bytes()


def run_linear(
    program: str, isa: str, cases: Sequence[LinearCase], folder: Path
) -> list[NDArray[np.float32]]:
    """y [n, m] of each case."""
    records = [
        encode("linear", *matrix(c.q), TABLES.index(c.tables), c.threads, len(c.x), c.x)
        for c in cases
    ]
    values = np.frombuffer(run(program, isa, records, folder), np.float32)
    ends = np.cumsum([len(c.x) * c.q.m for c in cases])
    assert values.size == ends[-1]
    parts = np.split(values, ends[:-1])
    return [part.reshape(-1, c.q.m) for part, c in zip(parts, cases, strict=True)]


def run_layout(
    program: str, q: QuantTensor, folder: Path
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16], NDArray[np.float32]]:
    """Codes, scales and offsets after packing and unpacking, and the dequantised weights [m, k]."""
    out = run(program, "scalar", [encode("layout", *matrix(q))], folder)
    stored = [0 if array is None else array.size for array in (q.scales, q.offsets)]
    ends = np.cumsum([q.codes.size, *(2 * size for size in stored)])
    assert len(out) == ends[-1] + 4 * q.codes.size
    return (
        np.frombuffer(out[: ends[0]], np.uint8).reshape(q.codes.shape),
        np.frombuffer(out[ends[0] : ends[1]], np.float16),
        np.frombuffer(out[ends[1] : ends[2]], np.float16),
        np.frombuffer(out[ends[2] :], np.float32).reshape(q.codes.shape),
    )


def run_vectors(
    program: str, isa: str, cases: Sequence[VectorCase], folder: Path
) -> list[NDArray[Any]]:
    """The output of each case, of its wanted size."""
    records = [encode(c.operation, *c.fields, *c.arrays) for c in cases]
    out = run(program, isa, records, folder)
    results: list[NDArray[Any]] = []
    at = 0
    for case in cases:
        dtype = np.dtype(np.float16 if case.operation == "to_half" else np.float32)
        results.append(np.frombuffer(out, dtype, case.want.size, at))
        at += results[-1].nbytes
    assert at == len(out)
    return results
