"""The tokenizer files of a Hugging Face folder, reduced to what a .lut carries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class TokenizerFiles:
    """Files (name -> contents; empty without a vocabulary) and whether text begins with BOS."""

    files: dict[str, bytes]
    add_bos_token: bool


def read_tokenizer(path: Path) -> TokenizerFiles:
    """tokenizer.json or else tokenizer.model, the chat template, and the settings that matter."""
    files: dict[str, bytes] = {}
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            files[name] = (path / name).read_bytes()
            break
    else:
        return TokenizerFiles({}, False)
    config = _object(path / "tokenizer_config.json")
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    if "tokenizer.json" in files:
        kept.pop("added_tokens_decoder", None)  # tokenizer.json has them
    files["tokenizer_config.json"] = json.dumps(
        kept, ensure_ascii=False, separators=(",", ":"), sort_keys=True
    ).encode()
    template = _chat_template(path, config)
    if template is not None:
        files["chat_template.jinja"] = template
    add_bos = kept.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = _rule_of_vocabulary(path, files, kept.get("bos_token"))
    return TokenizerFiles(files, add_bos)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    if not path.exists():
        return {}
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: a JSON object is needed")
    return value


def _chat_template(path: Path, config: dict[str, Any]) -> bytes | None:
    """chat_template.jinja, or the (default) template in tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_bytes()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelFileError(f"{path / 'tokenizer_config.json'}: chat_template must be a text")
    return template.encode()


def _rule_of_vocabulary(path: Path, files: dict[str, bytes], bos: Any) -> bool:
    """What the vocabulary file itself says: SentencePiece begins with BOS, a JSON may say so."""
    if "tokenizer.model" in files:
        return True
    text = bos.get("content") if isinstance(bos, dict) else bos
    processor = _parsed(path / "tokenizer.json", files["tokenizer.json"]).get("post_processor")
    steps = [processor, *(processor or {}).get("processors", [])]
    return text is not None and any(
        {"id": text, "type_id": 0} == part.get("SpecialToken")
        for step in steps
        if step
        for part in step.get("single", [])[:1]
    )
