"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tmac_py.errors import ModelFileError


def read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; empty where an ``optional`` file is not there.

    Raises ModelFileError for anything else than a JSON object in UTF-8.
    """
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # an escape may be half a character
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: a JSON object is needed")
    return value
