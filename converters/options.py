"""How matrices that a checkpoint stores as floats are quantised, as the user asked for it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tmac_py.converters.checkpoint import HEADS
from tmac_py.converters.quantizers import METHODS, Method, Settings
from tmac_py.errors import UnsupportedError
from tmac_py.quant import MAX_BITS

DEFAULT_BITS = 4
DEFAULT_HEAD_BITS = 6


@dataclass(frozen=True)
class QuantOptions:
    """How matrices that a checkpoint stores as floats are quantised; codes it stores are kept.

    ``quant`` names the method (`tmac_py.converters.quantizers.METHODS`). The bits of a matrix are
    those of the first pattern in ``bits_for`` that is found in its name; else ``head_bits``
    (None: 6) for embedding and lm_head and ``bits`` (None: 4) for others. ``target_bpw`` chooses
    what these leave open, so that the matrices of the file have at most so many bits per weight.
    ``asym`` None stores an offset per group below 8 bits and none at 8. ``group_size`` -1 is the
    whole row. ``act_order`` groups columns by the size of their inputs (gptq and bcq).
    ``calibration`` is a text file (None: the one that comes along), of which about
    ``calibration_tokens`` are used.

    Raises UnsupportedError for values that are not allowed.
    """

    quant: str = "mse"
    bits: int | None = None
    bits_for: tuple[tuple[str, int], ...] = ()
    head_bits: int | None = None
    group_size: int = 32
    asym: bool | None = None
    act_order: bool = False
    target_bpw: float | None = None
    calibration: str | Path | None = None
    calibration_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.quant not in METHODS:
            raise UnsupportedError(f"quant {self.quant!r} is not supported ({', '.join(METHODS)})")
        for name, value in (("bits", self.bits), ("head_bits", self.head_bits)):
            if value is not None:
                _check_bits(name, value)
        for pattern, value in self.bits_for:
            _check_bits(f"bits_for {pattern}", value)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UnsupportedError(
                    f"bits_for {pattern!r} is not a regular expression: {error}"
                ) from error
        if self.group_size != -1 and (self.group_size < 4 or self.group_size % 4):
            raise UnsupportedError(
                f"group_size {self.group_size} is not supported "
                "(a multiple of 4, or -1 for the whole row)"
            )
        if self.asym is False and self.method.offsets:
            raise UnsupportedError(f"quant {self.quant} always stores offsets: asym cannot be off")
        if self.act_order and not self.method.orders:
            orders = " and ".join(name for name, method in METHODS.items() if method.orders)
            raise UnsupportedError(
                f"quant {self.quant} keeps the order of columns: act_order needs {orders}"
            )
        if self.target_bpw is not None:
            if not (math.isfinite(self.target_bpw) and self.target_bpw > 0):
                raise UnsupportedError(
                    f"target_bpw {self.target_bpw} is not supported (a positive number)"
                )
            if self.bits is not None:
                raise UnsupportedError("target_bpw chooses the bits: bits cannot be given too")
        if self.calibration_tokens < 1:
            raise UnsupportedError(
                f"calibration_tokens {self.calibration_tokens} is not supported (1 up)"
            )

    @property
    def method(self) -> Method:
        """The method for the matrices of the layers."""
        return METHODS[self.quant]

    def bits_of(self, name: str) -> int | None:
        """Bits of the matrix of that name; None where ``target_bpw`` chooses."""
        for pattern, bits in self.bits_for:
            if re.search(pattern, name):
                return bits
        given = self.head_bits if name in HEADS else self.bits
        if given is not None or self.target_bpw is not None:
            return given
        return DEFAULT_HEAD_BITS if name in HEADS else DEFAULT_BITS

    def settings(self, bits: int) -> Settings:
        """Everything about a matrix that gets so many bits."""
        asym = bits < MAX_BITS if self.asym is None else self.asym
        return Settings(bits, self.group_size, asym or self.method.offsets, self.act_order)


def _check_bits(name: str, value: int) -> None:
    if not 1 <= value <= MAX_BITS:
        raise UnsupportedError(f"{name} {value} is not supported (1 to {MAX_BITS})")
