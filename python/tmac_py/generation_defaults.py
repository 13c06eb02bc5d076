"""How a model's makers want tokens to be chosen: generation_config.json, as transformers has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tmac_py.checks import check_real, check_whole
from tmac_py.errors import ModelFileError, OptionError

FILE = "generation_config.json"
"""Its name in checkpoints and among the tokenizer files of a .lut."""

_KEPT = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def keep_defaults(config: Mapping[str, Any]) -> bytes | None:
    """The part of a checkpoint's generation_config.json that a .lut carries; None if there is none.

    Raises ModelFileError for values that are not allowed.
    """
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    read_defaults(kept)
    return json.dumps(kept, separators=(",", ":"), sort_keys=True).encode() if kept else None


def load_defaults(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The same as `read_defaults` from the tokenizer files of a .lut."""
    if FILE not in files:
        return {}
    try:
        config = json.loads(files[FILE])
    except ValueError as error:
        raise ModelFileError(f"{FILE} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelFileError(f"{FILE} is not a JSON object")
    return read_defaults(config)


def read_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `tmac_py.sampling.SamplingParams` that ``config`` stands for.

    ``do_sample`` false is temperature 0; ``repetition_penalty`` looks back at all tokens. Raises
    ModelFileError for values that are not allowed.
    """
    found = {key: config[key] for key in _KEPT if config.get(key) is not None}
    sample = found.pop("do_sample", True)
    inf = float("inf")
    try:
        if not isinstance(sample, bool):
            raise OptionError(f"do_sample is {sample!r}; allowed: true, false")
        for key, value in found.items():
            if key == "top_k":
                check_whole(key, value, 0)
            elif key in ("top_p", "min_p"):
                check_real(key, value, 0, 1, "0 to 1", above_low=key == "top_p")
            else:
                note = "a finite number, 0 and more"
                check_real(key, value, 0, inf, note, above_low=key == "repetition_penalty")
    except OptionError as error:
        raise ModelFileError(f"{FILE}: {error}") from error
    if not sample:
        found["temperature"] = 0.0
    if (penalty := found.pop("repetition_penalty", 1)) != 1:
        found.update(repeat_penalty=penalty, repeat_last_n=-1)
    return found
