"""tmac_py: low-bit language models on the CPU, multiplied by table lookup.

>>> import tmac_py
>>> with tmac_py.Model.load("model.lut") as model:           # doctest: +SKIP
...     print(model.generate("The capital of France is", max_tokens=16))

Names are imported when they are first used, so ``import tmac_py`` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tmac_py.errors import (
    ContextError,
    DownloadError,
    ModelFileError,
    OptionError,
    TmacError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from tmac_py.conversation import Chat
    from tmac_py.generate import Result, Token
    from tmac_py.linear import LutLinear, mpgemm, quantize
    from tmac_py.model import Model
    from tmac_py.options import AnswerOptions, GenerationOptions
    from tmac_py.quant import QuantTensor
    from tmac_py.sampling import LogitsProcessor, SamplingParams
    from tmac_py.scoring import Score
    from tmac_py.session import Session

    __version__: str

__all__ = [
    "AnswerOptions",
    "Chat",
    "ContextError",
    "DownloadError",
    "GenerationOptions",
    "LogitsProcessor",
    "LutLinear",
    "Model",
    "ModelFileError",
    "OptionError",
    "QuantTensor",
    "Result",
    "SamplingParams",
    "Score",
    "Session",
    "TmacError",
    "Token",
    "UnsupportedError",
    "__version__",
    "mpgemm",
    "quantize",
]

_HOMES = {
    "AnswerOptions": "tmac_py.options",
    "Chat": "tmac_py.conversation",
    "GenerationOptions": "tmac_py.options",
    "LogitsProcessor": "tmac_py.sampling",
    "LutLinear": "tmac_py.linear",
    "Model": "tmac_py.model",
    "QuantTensor": "tmac_py.quant",
    "Result": "tmac_py.generate",
    "SamplingParams": "tmac_py.sampling",
    "Score": "tmac_py.scoring",
    "Session": "tmac_py.session",
    "Token": "tmac_py.generate",
    "__version__": "tmac_py._core",
    "mpgemm": "tmac_py.linear",
    "quantize": "tmac_py.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
