"""Write a file in whole aligned blocks, which systems that can keep in huge pages."""

from __future__ import annotations

from typing import BinaryIO

BLOCK_BYTES = 2 << 20
"""A huge page of x86-64, and of aarch64 with pages of 4 KiB."""


class BlockWriter:
    """Appends to an unbuffered file from ``position`` on, a block at a time.

    Linux keeps what was written in its page cache, in folios no larger than the writes (ext4, xfs,
    btrfs); one of a whole block is mapped as a huge page when the model is loaded. Raises OSError
    as the file does.
    """

    def __init__(self, file: BinaryIO, position: int) -> None:
        self._file = file
        self._start = position
        self._held = bytearray()

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self._start + len(self._held)

    def append(self, data: memoryview) -> None:
        """``data`` (bytes) after what is there."""
        while data.nbytes:
            room = BLOCK_BYTES - self.position % BLOCK_BYTES
            if not self._held and data.nbytes >= room:
                self._write(data[:room])
            else:
                self._held += data[:room]
                if self.position % BLOCK_BYTES == 0:
                    self.flush()
            data = data[room:]

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = self._held, bytearray()
        self._write(memoryview(held))

    def _write(self, view: memoryview) -> None:
        self._file.seek(self._start)
        self._start += view.nbytes
        while view.nbytes:
            view = view[self._file.write(view) :]
