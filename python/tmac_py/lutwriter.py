"""Write a .lut file tensor by tensor (docs/lut-format.md)."""

from __future__ import annotations

import errno
import glob
import os
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
from numpy.typing import NDArray

from tmac_py.blockwriter import BlockWriter
from tmac_py.config import ModelConfig, is_matrix
from tmac_py.errors import ModelFileError
from tmac_py.filelock import create_held, remove_unheld
from tmac_py.lutheader import (
    TOKENIZER_PREFIX,
    TensorEntry,
    TensorKind,
    build_header,
    check_file_name,
    check_shapes,
    check_spec,
    order_of,
    packed_nbytes,
)
from tmac_py.parallel import Background
from tmac_py.spec import LinearSpec

_SYNC_BYTES = 1 << 26
"""Written bytes that may wait for the disk; without a bound all of them wait at the end."""


class LutWriter:
    """Write one .lut file; a context manager.

    Packed matrices go to a temporary file beside ``path`` as they are added, each while the caller
    makes the next one; leaving the block without an exception checks that the model is complete,
    writes the rest and renames. Leaving it with any exception, KeyboardInterrupt included, removes
    the temporary file and leaves ``path`` as it was. Temporary files of processes that were killed
    go when the next writer of ``path`` comes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: ModelConfig,
        tokenizer: Mapping[str, bytes],
        source: Mapping[str, str],
        ordered: Collection[str] = (),
    ) -> None:
        """``ordered`` names the matrices that may get an order."""
        self._path = Path(path)
        self._config = config
        self._source = dict(source)
        self._tokenizer = dict(tokenizer)
        self._shapes = config.tensor_shapes()
        self._added: set[str] = set()
        self._linears: dict[str, TensorEntry] = {}
        self._synced = 0
        self._orders: dict[str, NDArray[np.int32]] = {}
        self._floats: dict[str, NDArray[np.float32]] = {}
        self._temporary: Path | None = None
        for name in self._tokenizer:
            check_file_name(name)
        self._data_start = _largest_header(config, self._source, self._tokenizer, ordered)

    def __enter__(self) -> LutWriter:
        if self._path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self._path))
        for left in self._path.parent.glob(f".{glob.escape(self._path.name)}.{'?' * 12}.tmp"):
            remove_unheld(left)
        file = None
        while file is None:
            temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}.tmp")
            try:
                file = create_held(temporary)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._file, self._temporary = file, temporary
        self._data = BlockWriter(self._file, self._data_start)
        self._background = Background()
        return self

    def add_linear(
        self,
        name: str,
        packed: NDArray[np.uint8],
        spec: LinearSpec,
        order: NDArray[np.int32] | None = None,
    ) -> None:
        """Append one packed matrix, uint8 ``[packed_nbytes]``, and keep its order ``[k]``.

        ``packed`` is written after the call returns and must not change any more. Raises
        ModelFileError when name, shape or size do not fit the configuration, OSError if the matrix
        before did not fit on the disk.
        """
        try:
            check_spec(spec)
        except ModelFileError as error:
            raise ModelFileError(f"tensor {name}: {error}") from None
        self._expect(name, (spec.m, spec.k))
        if packed.dtype != np.uint8 or packed.shape != (packed_nbytes(spec),):
            raise ModelFileError(
                f"tensor {name}: packed must be uint8 [{packed_nbytes(spec)}], "
                f"found {packed.dtype} {list(packed.shape)}"
            )
        if order is not None:
            self._orders[order_of(name)] = np.array(order, dtype="<i4", order="C")
        data = np.ascontiguousarray(packed).data

        def write() -> None:
            self._linears[name] = self._append(name, "linear", (spec.m, spec.k), data, spec)
            if self._data.position - self._synced > _SYNC_BYTES:
                self._sync()

        self._background.run(write)
        self._added.add(name)

    def add_float(self, name: str, values: NDArray[np.float32]) -> None:
        """Keep one float32 vector or router; it is written when the file is complete."""
        if values.dtype != np.float32:
            raise ModelFileError(f"tensor {name}: must be float32, found {values.dtype}")
        self._expect(name, values.shape)
        self._floats[name] = np.array(values, dtype="<f4", order="C")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._background.wait()
                self._commit()
        finally:
            self._background.close()
            self._file.close()
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        rest: list[tuple[str, TensorKind, tuple[int, ...], memoryview]] = []
        for name in self._shapes:
            if (order := self._orders.get(order_of(name))) is not None:
                rest.append((order_of(name), "order", order.shape, order.data.cast("B")))
        for name in self._shapes:
            if (values := self._floats.get(name)) is not None:
                rest.append((name, "float", values.shape, values.data.cast("B")))
        for name in sorted(self._tokenizer):
            data = self._tokenizer[name]
            rest.append((TOKENIZER_PREFIX + name, "file", (len(data),), memoryview(data)))
        entries = list(self._linears.values())
        for name, kind, shape, view in rest:
            entries.append(self._append(name, kind, shape, view))
        check_shapes(self._config, entries)
        header = build_header(self._config, self._source, entries, self._data_start)
        assert len(header) == self._data_start
        assert self._temporary is not None
        try:
            self._data.flush()
            first = BlockWriter(self._file, 0)
            first.append(memoryview(header))
            first.flush()
            self._sync()
            self._file.close()
            self._temporary.replace(self._path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._temporary = None
        _sync_folder(self._path.parent)

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._shapes:
            raise ModelFileError(f"tensor {name}: not part of this model")
        if name in self._added or name in self._floats:
            raise ModelFileError(f"tensor {name}: added twice")
        if shape != self._shapes[name]:
            raise ModelFileError(
                f"tensor {name}: shape {list(shape)}, must be {list(self._shapes[name])}"
            )

    def _sync(self) -> None:
        self._synced = self._data.position
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _append(
        self,
        name: str,
        kind: TensorKind,
        shape: tuple[int, ...],
        data: memoryview,
        spec: LinearSpec | None = None,
    ) -> TensorEntry:
        start = self._data.position - self._data_start
        try:
            self._data.append(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        digest = xxhash.xxh3_128_hexdigest(data)
        return TensorEntry(name, kind, shape, start, data.nbytes, digest, spec)


def _largest_header(
    config: ModelConfig,
    source: Mapping[str, str],
    tokenizer: Mapping[str, bytes],
    ordered: Collection[str],
) -> int:
    """Room for the header before any tensor is known: every number at its longest."""
    longest = 10**15
    placeholder = TensorEntry("", "linear", (), longest, longest, "0" * 32)
    entries = []
    for name, shape in config.tensor_shapes().items():
        if is_matrix(name, shape):
            number = -2.2250738585072014e-308
            m, k = shape
            spec = LinearSpec(m, k, 8, 2**31 - 1, "offset", number, scale=number)
            entries.append(replace(placeholder, name=name, spec=spec))
        else:
            entries.append(replace(placeholder, name=name, kind="float", shape=shape))
        if name in ordered:
            entries.append(replace(placeholder, name=order_of(name), kind="order", shape=shape[1:]))
    for name in tokenizer:
        entries.append(replace(placeholder, name=TOKENIZER_PREFIX + name, kind="file"))
    return len(build_header(config, source, entries))


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems cannot; the file itself is synced
                os.fsync(handle)
        finally:
            os.close(handle)
