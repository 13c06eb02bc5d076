"""Log probabilities of a model along a text in a file, to compare others with.

A safetensors file of three tensors: ``info`` (U8, JSON: the text, how it was cut, which model),
``ids`` (I32 [n], of the text) and ``log_probs`` (F16 [chunks, scored, vocab]). Half precision keeps
a log probability within 1/2048 of itself; reading makes each row sum to one again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.safetensors_file import read_header
from tmac_py.errors import ModelFileError, OptionError
from tmac_py.evaluation import ROWS, Chunking, Floats, Ids, log_softmax

_FORMAT = "tmac-eval log probabilities 1"
_ALIGN = 64
_LOWEST = -float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class LogitsInfo:
    """What a file of log probabilities says of itself.

    Attributes:
        text: the text.
        bos: token that takes the place of the first one of each chunk, or None.
        n_ctx, stride: how the text was cut, see Chunking.
        model, fingerprint: file name and checksum of the model.
        tables, kv, batch: how it ran; ``batch`` as for ModelLogProbs.
    """

    text: str
    bos: int | None
    n_ctx: int
    stride: int
    model: str
    fingerprint: str
    tables: str
    kv: str
    batch: int

    @property
    def chunking(self) -> Chunking:
        """How the text was cut."""
        return Chunking(self.n_ctx, self.stride)


class LogitsWriter:
    """Writes a file chunk by chunk; a context manager. The file appears when all are there.

    Args:
        path: the file; until it is whole its name ends in ``.part``.
        info: what it says of itself.
        ids: of the text [n].
        chunks: how many chunks will come.
        vocab: tokens of the vocabulary.
        done: chunks that an earlier writer has left in the ``.part`` file.
        keep: leave the ``.part`` file if not all chunks came, for another writer to go on with.

    Raises:
        OptionError: ``done`` chunks are not there.
    """

    def __init__(
        self,
        path: Path,
        info: LogitsInfo,
        ids: Ids,
        *,
        chunks: int,
        vocab: int,
        done: int = 0,
        keep: bool = False,
    ) -> None:
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        self._keep = keep
        shape = (chunks, info.chunking.scored, vocab)
        head = _head(info, ids, shape)
        chunk_bytes = 2 * shape[1] * shape[2]
        self._end = len(head) + chunks * chunk_bytes
        begin = len(head) + done * chunk_bytes
        self._whole = done == chunks and path.is_file()
        if self._whole:
            _check_head(path, head, self._end)
            return
        if done:
            _check_head(self._part, head, begin)
        self._file = self._part.open("r+b" if done else "w+b")
        if not done:
            self._file.write(head)
        self._file.truncate(begin)
        self._file.seek(begin)

    def append(self, log_probs: Floats) -> None:
        """Add the next rows [r, vocab]."""
        self._file.write(np.maximum(log_probs, _LOWEST).astype("<f2").tobytes())

    def flush(self) -> None:
        """Hand everything so far to the system."""
        if not self._whole:
            self._file.flush()

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._whole:
            return
        try:
            self._file.close()
            if kind is None and self._part.stat().st_size == self._end:
                os.replace(self._part, self._path)  # noqa: PTH105
        finally:
            if not self._keep:
                self._part.unlink(missing_ok=True)


class StoredLogits:
    """The log probabilities of a file, as a source for tmac_py.evaluation.score_chunk.

    Attributes:
        info: what the file says of itself.
        ids: of its text, int32 [n].
        chunks, vocab: sizes.

    Raises:
        ModelFileError: the file is not one of these, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        tensors = read_header(self._path)
        try:
            if {n: t.dtype for n, t in tensors.items()} != _DTYPES:
                raise ValueError("its tensors are others")
            raw = json.loads(tensors["info"].load().tobytes())
            if raw.pop("format", None) != _FORMAT:
                raise ValueError("another format")
            self.info = LogitsInfo(**raw)
            _check_types(self.info)
            self.ids: Ids = np.array(tensors["ids"].load(), np.int32)
            self._rows: NDArray[np.float16] = tensors["log_probs"].load()
            self.chunks, scored, self.vocab = self._rows.shape
            chunking = self.info.chunking
            if scored != chunking.scored or not 1 <= self.chunks <= chunking.count(len(self.ids)):
                raise ValueError("its sizes do not fit each other")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ModelFileError(
                f"{self._path}: not a file of tmac-eval --save-logits: {reason}"
            ) from error

    def blocks(self, index: int, ids: Ids, first: int) -> Iterator[Floats]:  # noqa: ARG002
        """As tmac_py.evaluation.LogProbs; ModelFileError for numbers that are none."""
        for row in range(0, self._rows.shape[1], ROWS):
            block = log_softmax(self._rows[index, row : row + ROWS])
            if not np.isfinite(block).all():
                raise ModelFileError(f"{self._path}: damaged: chunk {index + 1} is not finite")
            yield block


_DTYPES = {"info": "U8", "ids": "I32", "log_probs": "F16"}


def _head(info: LogitsInfo, ids: Ids, shape: tuple[int, int, int]) -> bytes:
    """Everything before the log probabilities."""
    text = json.dumps({"format": _FORMAT, **asdict(info)}).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    stored_ids = ids.astype("<i4").tobytes()
    ids_end = len(text) + len(stored_ids)
    header = {
        "info": {"dtype": "U8", "shape": [len(text)], "data_offsets": [0, len(text)]},
        "ids": {"dtype": "I32", "shape": [len(ids)], "data_offsets": [len(text), ids_end]},
        "log_probs": {
            "dtype": "F16",
            "shape": list(shape),
            "data_offsets": [ids_end, ids_end + 2 * shape[0] * shape[1] * shape[2]],
        },
    }
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(-(-(8 + len(encoded)) // _ALIGN) * _ALIGN - 8)
    return len(encoded).to_bytes(8, "little") + encoded + text + stored_ids


def _check_head(path: Path, head: bytes, size: int) -> None:
    """OptionError unless the file begins with ``head`` and has ``size`` bytes or more."""
    sound = path.is_file() and path.stat().st_size >= size
    if sound:
        with path.open("rb") as file:
            sound = file.read(len(head)) == head
    if not sound:
        raise OptionError(
            f"{path}: not what the evaluation that is to go on has saved; remove its state file to "
            "start anew"
        )


def _check_types(info: LogitsInfo) -> None:
    texts = (info.text, info.model, info.fingerprint, info.tables, info.kv)
    numbers = (info.n_ctx, info.stride, info.batch, *(() if info.bos is None else (info.bos,)))
    if not all(isinstance(t, str) for t in texts) or not all(type(n) is int for n in numbers):
        raise ValueError("its description is broken")
