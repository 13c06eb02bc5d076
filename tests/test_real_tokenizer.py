"""The default model's own tokenizer against llama.cpp and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmac_py.converters import gguf as reader
from tmac_py.converters.checkpoint import Checkpoint
from tmac_py.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(default_gguf: Path) -> Checkpoint:
    return reader.read(default_gguf)


def test_ids_are_llama_cpps(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint.tokenizer)
    for text, ids in zip(GOLDEN["texts"], GOLDEN["smollm2"], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text


def test_a_prompt_of_the_reference(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint.tokenizer)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user\n")[:3] == [1, 4093, 198]


def test_the_configuration(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2, 0)
    assert checkpoint.warnings == ()
    assert b"<|im_start|>" in checkpoint.tokenizer["chat_template.jinja"]
    assert len(checkpoint.tensors) == 272
    assert checkpoint.n_elements == 134_515_008
