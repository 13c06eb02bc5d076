"""What several programs read from their arguments: whole numbers, and texts in files."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tmac_py.errors import TmacError


def whole_number(
    low: int, high: int | None = None, *, unlimited: bool = False
) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``, and -1 if ``unlimited``."""
    allowed = f"a whole number from {low} " + (f"to {high}" if high is not None else "up")
    if unlimited:
        allowed += ", or -1"

    def parse(text: str) -> int:
        from tmac_py.checks import check_whole

        try:
            value = int(text)
            return value if unlimited and value == -1 else check_whole("", value, low, high)
        except ValueError:
            message = f"{text!r} is not allowed; give {allowed}"
            raise argparse.ArgumentTypeError(message) from None

    return parse


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text without a byte-order mark and without the newline at its end.

    Raises:
        TmacError: it is not UTF-8; ``where`` names the file.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise TmacError(
            f"{where}: not UTF-8 text (byte 0x{byte:02x} at offset {error.start:,})"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")
