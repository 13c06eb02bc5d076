"""The tokenizer files of a Hugging Face folder, reduced to what a .lut carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tmac_py.converters.json_file import read_object
from tmac_py.errors import ModelFileError

_KEPT = (
    "add_bos_token",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "legacy",
    "added_tokens_decoder",
)
"""Keys of tokenizer_config.json that matter when text is encoded."""

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Those that older folders have in special_tokens_map.json only."""


def read_tokenizer_files(path: Path) -> dict[str, bytes]:
    """Name -> contents: the vocabulary, the settings that matter, the chat template.

    The vocabulary is tokenizer.json or else tokenizer.model; without one there are no files.
    Raises ModelFileError for settings that are malformed.
    """
    files: dict[str, bytes] = {}
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            files[name] = (path / name).read_bytes()
            break
    else:
        return {}
    config = read_object(path / "tokenizer_config.json", optional=True)
    named = read_object(path / "special_tokens_map.json", optional=True)
    every = {**{key: named.get(key) for key in _NAMED}, **config}
    kept = {key: every[key] for key in _KEPT if every.get(key) is not None}
    if "tokenizer.json" in files:
        kept.pop("added_tokens_decoder", None)  # tokenizer.json has them
    files["tokenizer_config.json"] = json.dumps(
        kept, ensure_ascii=False, separators=(",", ":"), sort_keys=True
    ).encode()
    template = _chat_template(path, config)
    if template:
        files["chat_template.jinja"] = template
    return files


def _chat_template(path: Path, config: dict[str, Any]) -> bytes | None:
    """chat_template.jinja, or the (default) template in chat_template.json or
    tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_bytes()
    file = path / "chat_template.json"
    template = read_object(file, optional=True).get("chat_template")
    if template is None:
        file = path / "tokenizer_config.json"
        template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        template = named[0] if named else None
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelFileError(
            f"{file}: chat_template must be a text, or a list of objects with a name and a template"
        )
    return template.encode()
