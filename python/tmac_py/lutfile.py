"""Map a .lut file without copying and check it (docs/lut-format.md)."""

from __future__ import annotations

import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.errors import ModelFileError, TmacError
from tmac_py.lutheader import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    TOKENIZER_PREFIX,
    Header,
    TensorEntry,
    order_of,
    parse_header,
)
from tmac_py.spec import LinearSpec

_CHECK_THREADS = 2


class LutFile:
    """A mapped .lut file; a context manager.

    Arrays are read-only views of the map: they cost no memory of their own and stay valid after
    ``close`` for as long as they are referenced.
    """

    def __init__(self, path: Path, header: Header, mapped: mmap.mmap) -> None:
        self.path = path
        self._header = header
        self._map: mmap.mmap | None = mapped

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> LutFile:
        """Map the file at ``path`` and check its header; with ``check``, every tensor's bytes too.

        Raises ModelFileError (UnsupportedError for a sound file of an unsupported model) in one
        line that names the file, what is wrong with it and, for damage, the tensor.
        """
        path = Path(path)
        try:
            with _open_regular(path) as file:
                header = _read_header(file)
                mapped = _map(file)
        except TmacError as error:
            raise type(error)(f"{path}: {error}") from None
        result = cls(path, header, mapped)
        if check:
            result.check()
        return result

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._header.config

    @property
    def source(self) -> dict[str, str]:
        """Where the weights came from, as the converter noted it."""
        return self._header.source

    @property
    def metadata(self) -> dict[str, str]:
        """The raw safetensors ``__metadata__``."""
        return self._header.metadata

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, in file order."""
        return self._header.entries

    @property
    def tokenizer(self) -> dict[str, bytes]:
        """The tokenizer files by name."""
        return {
            name[len(TOKENIZER_PREFIX) :]: self._bytes(entry).tobytes()
            for name, entry in self.tensors.items()
            if entry.kind == "file"
        }

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that tell this model from others: of the tensors' checksums."""
        sums = "".join(f"{entry.name} {entry.xxh3}\n" for entry in self.tensors.values())
        return xxhash.xxh3_128_hexdigest(sums.encode())

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._header.data_start + sum(entry.nbytes for entry in self.tensors.values())

    def linear(self, name: str) -> tuple[NDArray[np.uint8], LinearSpec]:
        """A packed matrix, uint8 ``[packed_nbytes]``, and its spec. KeyError if not there."""
        entry = self.tensors[name]
        if entry.spec is None:
            raise KeyError(name)
        return self._bytes(entry), entry.spec

    def order(self, name: str) -> NDArray[np.int32] | None:
        """Which activation each column of that packed matrix multiplies, int32 [k].

        None where column j multiplies activation j.
        """
        entry = self.tensors.get(order_of(name))
        return None if entry is None else self._bytes(entry).view("<i4")

    def float(self, name: str) -> NDArray[np.float32]:
        """A float32 vector, or a layer's router. Raises KeyError if there is none of that name."""
        entry = self.tensors[name]
        if entry.kind != "float":
            raise KeyError(name)
        return self._bytes(entry).view("<f4").reshape(entry.shape)

    def check(self) -> None:
        """Raise ModelFileError, naming the tensor, unless every tensor matches its checksum."""

        def is_sound(entry: TensorEntry) -> bool:
            return xxhash.xxh3_128_hexdigest(self._bytes(entry).data) == entry.xxh3

        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            sound = pool.map(is_sound, self.tensors.values())
            damaged = [
                entry for entry, ok in zip(self.tensors.values(), sound, strict=True) if not ok
            ]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            raise ModelFileError(
                f"{self.path}: tensor {damaged[0].name}{more} does not match its checksum: "
                "the file is damaged"
            )

    def close(self) -> None:
        """Let go of the map. Asking for a tensor afterwards raises ValueError."""
        if self._map is not None:
            mapped, self._map = self._map, None
            with suppress(BufferError):  # views are alive: the map goes with the last of them
                mapped.close()

    def __enter__(self) -> LutFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _bytes(self, entry: TensorEntry) -> NDArray[np.uint8]:
        if self._map is None:
            raise ValueError(f"{self.path}: the file is closed")
        offset = self._header.data_start + entry.start
        if entry.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._map, np.uint8, count=entry.nbytes, offset=offset)


def _map(file: BinaryIO) -> mmap.mmap:
    """All of ``file``; in huge pages where the system has them for files (docs/lut-format.md)."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _open_regular(path: Path) -> BinaryIO:
    if path.is_dir():
        raise ModelFileError(
            "a folder, not a .lut file; convert a Hugging Face folder with tmac-convert"
        )
    if not path.exists():
        raise ModelFileError("no such file")
    if not path.is_file():
        raise ModelFileError("not a regular file")
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}") from None


def _read_header(file: BinaryIO) -> Header:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(9)
    if not start:
        raise ModelFileError("an empty file, not a .lut file")
    if start[:4] == b"GGUF":
        raise ModelFileError("a GGUF file, not a .lut file; convert it with tmac-convert")
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        raise ModelFileError("not a .lut file (it does not begin with a safetensors header)")
    if 8 + length > size:
        raise ModelFileError(
            f"truncated: the header takes {8 + length:,} bytes, the file has {size:,}"
        )
    file.seek(8)
    header = parse_header(file.read(length), data_bytes=size - 8 - length)
    if header.data_start % ALIGNMENT:
        raise ModelFileError(f"the data starts at byte {header.data_start}, not a multiple of 64")
    return header
