"""Texts on which quantisers look at activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.tokenizer import Tokenizer

_DEFAULT = "calibration.txt"
_LENGTH = 512
"""Tokens of each text."""

_FEWEST = 32
"""Fewer tokens than these say nothing about activations."""


@dataclass(frozen=True)
class CalibrationText:
    """A text and what the .lut says of it."""

    name: str
    text: str

    @property
    def description(self) -> str:
        """Name and checksum."""
        return f"{self.name} xxh3={xxhash.xxh3_64_hexdigest(self.text.encode())}"


def read_text(path: str | Path | None) -> CalibrationText:
    """The file, or the text that comes with this package. ModelFileError unless it is UTF-8."""
    if path is None:
        content = files("tmac_py.converters").joinpath(_DEFAULT).read_text(encoding="utf-8")
        return CalibrationText("default", content)
    try:
        return CalibrationText(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: calibration needs a text in UTF-8") from error


def token_texts(
    text: CalibrationText, tokens: int, tokenizer: Mapping[str, bytes], config: ModelConfig
) -> NDArray[np.int32]:
    """Token ids ``[n, length]``: up to ``tokens`` of them, in pieces evenly spaced over the text.

    Each piece begins as a prompt does. Raises UnsupportedError for a model without a tokenizer,
    ModelFileError for a text too short.
    """
    if not tokenizer:
        raise UnsupportedError(
            "calibration needs a tokenizer, which this checkpoint lacks "
            "(rtn, mse and hqq need none)"
        )
    vocabulary = Tokenizer(tokenizer, bos_id=config.bos_token_id)
    prompt = vocabulary.encode(text.text)
    plain = vocabulary.encode(text.text, add_special=False)
    begin = prompt[: len(prompt) - len(plain)]
    if len(plain) < _FEWEST:
        raise ModelFileError(
            f"calibration text {text.name} has {len(plain)} tokens; {_FEWEST} are needed"
        )
    length = min(_LENGTH, tokens, config.max_position_embeddings, len(begin) + len(plain))
    body = max(1, length - len(begin))
    count = max(1, min(tokens // length, len(plain) // body))
    starts = np.linspace(0, len(plain) - body, count).astype(int)
    return np.array([begin + plain[start : start + body] for start in starts], np.int32)
