"""Tokenizers out of GGUF files: the ids must be llama.cpp's (tests/golden/make_tokens.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from tiny_checkpoints import TINY, hf_config, random_weights, write_hf
from tmac_py.converters import open_checkpoint
from tmac_py.converters.gguf_container import GGUFFile
from tmac_py.converters.gguf_vocab import PRE_TOKENIZERS, GGUFVocab, TokenType, read_vocab
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text())
TEXTS: list[str] = GOLDEN["texts"]
BPE, SPM = GOLDEN["bpe"], GOLDEN["sentencepiece"]


def vocab_of(folder: Path, vocab: dict[str, Any], model: str, **changes: Any) -> GGUFVocab | None:
    """What is read from a GGUF file of this vocabulary; a change of None leaves the key out."""
    values = {
        "model": model,
        "pre": "gpt-2" if model == "gpt2" else "default",
        "tokens": vocab["tokens"],
        "token_type": vocab["types"],
        "scores": vocab.get("scores"),
        "merges": vocab.get("merges"),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    path = folder / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_vocab(path, GGUFFile(path).metadata)


def tokenizer_of(folder: Path, vocab: dict[str, Any], model: str, **changes: Any) -> Tokenizer:
    read = vocab_of(folder, vocab, model, **changes)
    assert read is not None
    return Tokenizer(read.files)


@pytest.mark.parametrize("pre", BPE["ids"])
def test_bpe_ids_are_llama_cpps(tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_of(tmp_path, BPE, "gpt2", pre=pre)
    for text, ids in zip(TEXTS, BPE["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text


def test_the_golden_ids_tell_pre_tokenizers_apart() -> None:
    ids = {pre: json.dumps(rows) for pre, rows in BPE["ids"].items()}
    assert ids.pop("starcoder") == ids["smollm"]
    assert len(set(ids.values())) == len(ids)


def test_tekken_cuts_words_where_case_changes(tmp_path: Path) -> None:
    cut = tokenizer_of(tmp_path, BPE, "gpt2", pre="tekken")._backend._tokenizer.pre_tokenizer  # type: ignore[attr-defined]
    words = [word for word, _ in cut.pre_tokenize_str("HelloWorld JSONData's 42/\n x")]
    assert words == ["Hello", "World", "ĠJSONData", "'s", "Ġ", "4", "2", "/Ċ", "Ġx"]


def test_sentencepiece_ids_are_llama_cpps(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, SPM, "llama")
    for text, ids in zip(TEXTS, SPM["ids"], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text


def test_bos_eos_and_end_tokens(tmp_path: Path) -> None:
    tokens = BPE["tokens"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    read = vocab_of(tmp_path, BPE, "gpt2", eos_token_id=1, chat_template="{{ x }}")
    assert read is not None
    assert (read.size, read.bos_token_id) == (len(tokens), 1)
    assert read.eos_token_ids == (1, 2, 0)  # the file's own, then <|im_end|> and <|endoftext|>
    assert read.files["chat_template.jinja"] == b"{{ x }}"
    assert json.loads(read.files["tokenizer_config.json"]) == {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_start|>",
    }
    read = vocab_of(tmp_path, BPE, "gpt2", eot_token_id=7)
    assert read is not None
    assert read.eos_token_ids == (2, 7, 0)


def test_end_tokens_are_those_of_a_hugging_face_folder(tmp_path: Path) -> None:
    read = vocab_of(tmp_path, BPE, "gpt2", eos_token_id=7)
    assert read is not None
    assert read.eos_token_ids == (7, 2, 0)
    path = write_hf(tmp_path / "m", random_weights(TINY), hf_config(TINY, eos_token_id=None))
    for name, content in read.files.items():
        (path / name).write_bytes(content)
    assert open_checkpoint(path).config.eos_token_ids == read.eos_token_ids


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ("gpt2", {"pre": "llama-bpe"}, True),
        ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}, False),
        ("gpt2", {"pre": "smollm"}, False),
        ("gpt2", {"add_bos_token": True}, True),
        ("llama", {}, True),
        ("llama", {"add_bos_token": False}, False),
        ("llama", {"bos_token_id": None}, False),
    ],
)
def test_the_begin_token(
    tmp_path: Path, model: str, changes: dict[str, Any], expected: bool
) -> None:
    vocab = BPE if model == "gpt2" else SPM
    read = vocab_of(tmp_path, vocab, model, **changes)
    assert read is not None
    settings = json.loads(read.files["tokenizer_config.json"])
    assert settings["add_bos_token"] is expected
    ids = Tokenizer(read.files).encode("Hello")
    assert (ids[0] == 1) is expected


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    types = list(BPE["types"])
    types[2] = int(TokenType.USER_DEFINED)
    tokenizer = tokenizer_of(tmp_path, BPE, "gpt2", token_type=types)
    ids = tokenizer.encode("a<|im_end|>b", add_special=False)
    assert 2 in ids
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer_of(tmp_path, BPE, "gpt2").decode(ids) == "ab"


def test_no_tokenizer(tmp_path: Path) -> None:
    assert vocab_of(tmp_path, BPE, "no_vocab") is None
    assert vocab_of(tmp_path, BPE, "gpt2", tokens=None) is None


def test_a_missing_pre_tokenizer_is_warned_about(tmp_path: Path) -> None:
    read = vocab_of(tmp_path, BPE, "gpt2", pre=None)
    assert read is not None
    assert "no pre-tokenizer" in read.warnings[0]
    tokenizer = Tokenizer(read.files)
    ids = [tokenizer.encode(text, add_special=False) for text in TEXTS]
    assert ids == BPE["ids"]["default"]


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        ("gpt2", {"pre": "klingon"}, "pre-tokenizer 'klingon'"),
        ("bert", {}, "tokenizer 'bert'"),
        ("gpt2", {"merges": None}, "merges is missing"),
        ("gpt2", {"merges": ["nospace"]}, "merge 'nospace'"),
        ("gpt2", {"merges": ["q \u4e00"]}, "not made of two tokens"),
        ("gpt2", {"token_type": [1, 2]}, "token_type"),
        ("gpt2", {"token_type": [9] * len(BPE["tokens"])}, "token_type"),
        ("gpt2", {"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ("gpt2", {"tokens": ["a"] * len(BPE["tokens"])}, "occur twice"),
        ("gpt2", {"tokens": [1] * len(BPE["tokens"])}, "another type"),
        ("llama", {"scores": None}, "scores"),
        ("llama", {"token_type": [1] * len(SPM["tokens"])}, "unknown token"),
    ],
)
def test_refusals(tmp_path: Path, model: str, changes: dict[str, Any], text: str) -> None:
    vocab = SPM if model == "llama" else BPE
    kind = UnsupportedError if "okenizer '" in text else ModelFileError
    with pytest.raises(kind, match=text) as caught:
        vocab_of(tmp_path, vocab, model, **changes)
    assert str(tmp_path) in str(caught.value)


def test_every_pre_tokenizer_has_a_test() -> None:
    aliases = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "refact": "smollm"}
    for name, patterns in PRE_TOKENIZERS.items():
        tested = aliases.get(name, name)
        assert PRE_TOKENIZERS[tested] == patterns
        assert tested in {*BPE["ids"], "tekken"}
