"""A .lut of a random model of a few layers, small enough to run in milliseconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from kernel_cases import binary_coded
from tiny_vocab import CHATML, byte_level_json
from tmac_py.config import ModelConfig
from tmac_py.lutwriter import LutWriter
from tmac_py.packing import pack
from tmac_py.quant import QuantTensor, quantize_rtn, quantize_ternary

N_CTX = 96
VOCAB = 320


def tiny_config(**changes) -> ModelConfig:
    """Two layers, grouped-query attention, head_dim unlike hidden_size / heads."""
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": N_CTX,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**{**values, **changes})


def ternary(weights) -> QuantTensor:
    """Ternary weights, of a scale that fp16 holds."""
    return quantize_ternary(weights, scale=float(np.float16(np.abs(weights).mean())))


def ternary_as_uniform(weights) -> QuantTensor:
    """The same with codes as bit planes, and the scale with every row."""
    q = ternary(weights)
    scales = np.full((q.m, 1), q.scale, np.float16)
    return replace(q, encoding="uniform", scales=scales, scale=None)


def asymmetric(weights, bits=4) -> QuantTensor:
    """Evenly spaced weights with offsets."""
    return quantize_rtn(weights, bits=bits, group_size=32, asym=True)


def binary(weights, bits=4) -> QuantTensor:
    """The same, binary-coded."""
    return binary_coded(asymmetric(weights, bits))


def write_tiny_model(
    path: Path,
    *,
    seed=0,
    bits=4,
    chat=True,
    files=None,
    special=(),
    quantize=ternary,
    change=lambda _name, q: q,
    **config,
) -> Path:
    """Write the model to ``path``; the vocabulary is padded beyond what the tokenizer has.

    Matrices whose names hold one of ``special`` are quantised by ``quantize``; ``change`` is called
    with the name of each and what it was quantised to.
    """
    if files is None:
        settings = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        files = {
            "tokenizer.json": byte_level_json(),
            "tokenizer_config.json": json.dumps(settings).encode(),
        }
        if chat:
            files["chat_template.jinja"] = CHATML.encode()
    random = np.random.default_rng(seed)
    model = tiny_config(**config)
    with LutWriter(
        path,
        config=model,
        tokenizer=files,
        source={"test": "random"},
        ordered=[name for name in model.tensor_shapes() if "_proj" in name or "lm_head" in name],
    ) as writer:
        for name, shape in model.tensor_shapes().items():
            if len(shape) == 1:
                writer.add_float(name, random.uniform(0.5, 1.5, shape).astype(np.float32))
                continue
            weights = random.standard_normal(shape).astype(np.float32) / np.sqrt(shape[1])
            head = "embed" in name or "lm_head" in name
            if any(part in name for part in special):
                q = quantize(weights)
            else:
                q = quantize_rtn(
                    weights * (8 if head else 1), bits=8 if head else bits, group_size=32
                )
            q = change(name, q)
            writer.add_linear(name, pack(q), q.spec, q.order)
    return path


def flat_head(weights) -> QuantTensor:
    """An embedding that leaves many tokens likely; by default the last token comes again."""
    return quantize_rtn(weights, bits=8, group_size=32)
