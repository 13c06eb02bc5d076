"""Write family-*.npz: a tiny decoder of each family as transformers saves it, and its logits.

Needs ``pip install torch transformers``; the tests read the files and need neither.
Run as ``PYTHONPATH=python:tests python tests/golden/make_families.py [NAME ...]``.

Every feature that the family has is switched on, norms and biases are random, and weights are such
that 8 bits hold them exactly, as in make_tiny_models.py. Logits are plain float32 ("logits"; of the
first tokens alone, "logits_begin", where a longer text changes them), and "exact_error" is how far
the decoder's documented roundings with exact tables move them: products by tables, keys and values
in fp16. Weights of OLMoE are saved as transformers holds them, all experts in a tensor, others as
published checkpoints have them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from make_tiny_models import logits_of, on_a_grid, table_product
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tmac_py.quant import QuantTensor, quantize_rtn

N_IDS = 40
N_BEGIN = 20
WINDOW = 7

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 68,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]
CAPS = {"final_logit_softcapping": 6.0}

MODELS: dict[str, tuple[PreTrainedConfig, torch.dtype]] = {
    "llama": (
        LlamaConfig(
            **COMMON,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.float16,
    ),
    "qwen2": (
        Qwen2Config(
            **COMMON,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.bfloat16,
    ),
    "qwen3": (
        Qwen3Config(
            **COMMON,
            head_dim=20,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.bfloat16,
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **COMMON,
            head_dim=20,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=WINDOW,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.bfloat16,
    ),
    "olmoe": (
        OlmoeConfig(
            **{**COMMON, "intermediate_size": 40, "num_hidden_layers": 2},
            attention_bias=True,
            clip_qkv=1.5,
            num_experts=5,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.float16,
    ),
    "smollm3": (
        SmolLM3Config(
            **COMMON,
            attention_bias=True,
            mlp_bias=True,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.float16,
    ),
    "phi3": (
        Phi3Config(
            **{**COMMON, "hidden_size": 64},
            sliding_window=WINDOW,
            original_max_position_embeddings=24,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 2.5],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
            },
        ),
        torch.bfloat16,
    ),
    "gemma2": (
        Gemma2Config(
            **COMMON,
            **CAPS,
            head_dim=16,
            attention_bias=True,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=10,
            sliding_window=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        torch.bfloat16,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **COMMON,
            **CAPS,
            head_dim=16,
            attention_bias=True,
            query_pre_attn_scalar=10,
            sliding_window=WINDOW,
            layer_types=SLIDE,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        ),
        torch.float16,
    ),
}
"""name -> configuration, dtype of the weights"""

GROUP_SIZE = 16


def fill(model: PreTrainedModel, rng: np.random.Generator) -> None:
    """Weights that let attention choose, in the model's dtype without loss."""
    steps = range(8, 16) if model.dtype == torch.float16 else range(1, 2)
    centre = 0.0 if "Gemma" in type(model).__name__ else 1.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            values = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
        elif parameter.ndim == 1:
            values = rng.normal(centre, 0.2, parameter.shape).astype(np.float32)
        elif parameter.ndim == 3:  # an expert each
            size = 1 / parameter.shape[2] ** 0.5
            values = np.stack(
                [on_a_grid(rng, tuple(w.shape), GROUP_SIZE, size, steps) for w in parameter]
            )
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            size = 0.4 if "embed" in name else gain / parameter.shape[1] ** 0.5
            values = on_a_grid(rng, tuple(parameter.shape), GROUP_SIZE, size, steps)
        parameter.data = torch.from_numpy(values).to(model.dtype)


def experts_by_tables(
    experts: torch.nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The forward of transformers' experts for x [n, hidden], with products by exact tables."""
    out = torch.zeros_like(x)
    for expert in chosen.unique():
        tokens, place = torch.where(chosen == expert)
        gate_up, down = (
            partial(table_product, quantised(w[expert]), "exact", None)
            for w in (experts.gate_up_proj, experts.down_proj)
        )
        gate, up = gate_up(x[None, tokens]).chunk(2, dim=-1)
        y = down(experts.act_fn(gate) * up)[0]
        out.index_add_(0, tokens, y * weights[tokens, place, None])
    return out


def quantised(weight: torch.Tensor) -> QuantTensor:
    """8 bits, which must hold the weights exactly."""
    w = weight.detach().numpy()
    result = quantize_rtn(w, bits=8, group_size=GROUP_SIZE)
    assert np.array_equal(result.dequantize(), w)
    return result


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[None]:
    """Within: products by exact tables, keys and values in fp16."""
    module = sys.modules[type(model).__module__]
    attend = module.eager_attention_forward

    def attend_to_halves(
        layer: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        return attend(layer, query, key.half().float(), value.half().float(), *rest, **named)

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "eager_attention_forward", attend_to_halves))
        for linear in model.modules():
            if hasattr(linear, "gate_up_proj") and isinstance(
                linear.gate_up_proj, torch.nn.Parameter
            ):
                stack.enter_context(
                    patch.object(linear, "forward", partial(experts_by_tables, linear))
                )
            if isinstance(linear, torch.nn.Linear):
                product = partial(table_product, quantised(linear.weight), "exact", None)
                if linear.bias is not None:
                    product = partial(lambda p, b, x: p(x) + b, product, linear.bias.detach())
                stack.enter_context(patch.object(linear, "forward", product))
        yield


def make(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of one file."""
    config, dtype = MODELS[name]
    rng = np.random.default_rng(0)
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(fresh, rng)
    ids = rng.integers(0, config.vocab_size, N_IDS).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder, save_original_format=name != "olmoe")
        files = {
            file.name: np.frombuffer(file.read_bytes(), np.uint8)
            for file in sorted(Path(folder).iterdir())
        }
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    embedding = model.model.embed_tokens
    if hasattr(embedding, "embed_scale"):  # as it is with weights of their own dtype
        embedding.embed_scale.data = embedding.embed_scale.to(dtype).float()
    texts = {"logits": ids}
    if name == "phi3":
        texts["logits_begin"] = ids[:N_BEGIN]
    plain = {key: logits_of(model, text) for key, text in texts.items()}
    with rounded(model):
        errors = [np.abs(logits_of(model, texts[key]) - plain[key]).max() for key in texts]
    return {
        **files,
        **plain,
        "ids": ids,
        "group_size": np.int64(GROUP_SIZE),
        "exact_error": max(errors),
        "versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, transformers)]),
    }


def main() -> None:
    """Write one file per family, next to this script."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        arrays = make(name)
        path = Path(__file__).parent / f"family-{name}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path.name}: {path.stat().st_size} bytes, logits of {arrays['logits'].std():.2f}, "
            f"exact tables move logits by up to {arrays['exact_error']:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
