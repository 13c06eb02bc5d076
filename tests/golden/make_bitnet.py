"""Write bitnet-*.npz: tiny BitNet b1.58 models in the forms they are published in.

Needs ``pip install torch transformers``; the tests read the files and need neither.
Run as ``PYTHONPATH=python:tests python tests/golden/make_bitnet.py``.

The modules are those of transformers.integrations.bitnet (`BitLinear`, `AutoBitLinear`), which
packs, unpacks and multiplies. A file holds the folder, the matrices as these modules have them
("w.<name>", dequantised in float64 where they divide), and two kinds of float32 logits: plain ones,
and "logits_rounded" with the decoder's documented roundings in place: keys and values in fp16, and
the inputs of lm_head in 14 bits. Positions are "settled" as make_tiny_models.py has it:
round-off moves none of the roundings they hang on. Embeddings and lm_head are such that 8 bits hold
them exactly.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from make_tiny_models import N_TRIALS, ROUND_OFF, SETTLED, logits_of, on_a_grid, table_product
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, PreTrainedModel
from transformers.integrations.bitnet import (
    AutoBitLinear,
    BitLinear,
    WeightQuant,
    pack_weights,
    replace_with_bitnet_linear,
    unpack_weights,
)
from transformers.utils.quantization_config import BitNetQuantConfig

from tmac_py.quant import quantize_rtn

torch._dynamo.config.disable = True  # some functions are compiled, which changes no result

N_IDS = 28
ENOUGH = 20
HEAD_GROUP = 32

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
BITNET = BitNetConfig(**SIZES, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
DIVIDE = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
OFFLINE = {**DIVIDE, "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**OFFLINE, "quantization_mode": "online"}

FORMS: dict[str, tuple[LlamaConfig | BitNetConfig, dict[str, Any]]] = {
    "llama-packed": (LLAMA, DIVIDE),  # Falcon3-1.58bit, HF1BitLLM
    "llama-offline": (LLAMA, OFFLINE),
    "llama-online": (LLAMA, ONLINE),
    "bitnet-offline": (BITNET, OFFLINE),  # microsoft/bitnet-b1.58-2B-4T
    "bitnet-online": (BITNET, ONLINE),  # its bf16 master
}


def master_weights(model: PreTrainedModel, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Weights in bfloat16; layers as they are trained, the others on a grid of 8 bits."""
    state = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            values = rng.normal(1, 0.2, shape)
        elif "embed" in name or "lm_head" in name:
            size = 0.4 if "embed" in name else 1 / shape[1] ** 0.5
            values = on_a_grid(rng, (shape[0], shape[1]), HEAD_GROUP, size, range(1, 2))
        else:
            values = rng.normal(0, 0.02 * rng.uniform(0.5, 2), shape)
        state[name] = torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16)
    return state


def stored_form(
    state: dict[str, torch.Tensor], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a folder: masters as they are, or packed weights and their scales."""
    if settings == ONLINE:
        return state
    stored = {}
    for name, weight in state.items():
        if weight.ndim == 1 or "embed" in name or "lm_head" in name:
            stored[name] = weight
            continue
        scale = weight.float().abs().mean().clamp(min=1e-5)
        trits = (weight.float() * (1 / scale)).round().clamp(-1, 1)
        assert torch.allclose(WeightQuant.apply(weight.float()), trits * scale, rtol=1e-6)
        stored[name] = pack_weights(trits)
        kept = 1 / scale if settings == DIVIDE else scale
        stored[name + "_scale"] = kept.reshape(1).to(torch.bfloat16)
    return stored


def build(
    config: LlamaConfig | BitNetConfig, settings: dict[str, Any], stored: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """The model of a folder, in float32."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    quantisation = BitNetQuantConfig(**{k: v for k, v in settings.items() if k != "quant_method"})
    replace_with_bitnet_linear(model, ["lm_head"], quantisation)
    model.to_empty(device="cpu")
    state = {}
    for name, tensor in stored.items():
        if tensor.dtype != torch.uint8:
            state[name] = tensor.float()
        elif settings == OFFLINE:
            state[name] = unpack_weights(tensor, torch.float32)
        else:
            state[name] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, extra = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not extra, extra
    rotary = type(model.model.rotary_emb)(config)  # its buffers are not in the state
    model.model.rotary_emb = rotary
    return model.eval()


def dequantised(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """The matrix of every BitNet module."""
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            w = unpack_weights(module.weight, torch.float64) / module.weight_scale.double()
        elif isinstance(module, AutoBitLinear):
            online = module.online_quant
            w = WeightQuant.apply(module.weight) if online else module.weight * module.weight_scale
        else:
            continue
        matrices[f"w.{name}.weight"] = w.detach().float().numpy()
    return matrices


@contextmanager
def rounded(model: PreTrainedModel, noise: np.random.Generator | None = None) -> Iterator[None]:
    """Within: lm_head by `exact` tables, keys and values in fp16; and inputs with round-off."""
    module = sys.modules[type(model).__module__]
    attend: Callable[..., Any] = module.eager_attention_forward

    def attend_to_halves(
        layer: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        return attend(layer, query, key.half().float(), value.half().float(), *rest, **named)

    def with_round_off(rng: np.random.Generator, _module: Any, inputs: Any) -> Any:
        factors = 1 + ROUND_OFF * rng.normal(size=tuple(inputs[0].shape))
        return (inputs[0] * torch.from_numpy(factors.astype(np.float32)),)

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "eager_attention_forward", attend_to_halves))
        head = quantize_rtn(model.lm_head.weight.detach().numpy(), bits=8, group_size=HEAD_GROUP)
        assert np.array_equal(head.dequantize(), model.lm_head.weight.detach().numpy())
        product = partial(table_product, head, "exact", noise)
        stack.enter_context(patch.object(model.lm_head, "forward", product))
        for linear in model.modules():
            if noise is not None and isinstance(linear, BitLinear | AutoBitLinear):
                hook = linear.register_forward_pre_hook(partial(with_round_off, noise))
                stack.callback(hook.remove)
        yield


def make(name: str, seed: int) -> dict[str, NDArray[Any]] | None:
    """The arrays of one file, or None where too many positions of this seed hang on a rounding."""
    config, settings = FORMS[name]
    rng = np.random.default_rng(seed)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stored = stored_form(master_weights(fresh, rng), settings)
    model = build(config, settings, stored)
    ids = rng.integers(0, config.vocab_size, N_IDS).astype(np.int32)
    with rounded(model):
        expected = logits_of(model, ids)
    settled = np.ones(N_IDS, bool)
    for trial in range(N_TRIALS):
        with rounded(model, np.random.default_rng(trial)):
            settled &= np.abs(logits_of(model, ids) - expected).max(axis=1) < SETTLED
        if settled.sum() < ENOUGH:
            return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        architecture = type(fresh).__name__
        values = {**config.to_diff_dict(), **SIZES, "architectures": [architecture]}
        values |= {"tie_word_embeddings": config.tie_word_embeddings, "dtype": "bfloat16"}
        values |= {"rope_parameters": config.rope_parameters, "hidden_act": config.hidden_act}
        values["quantization_config"] = settings
        (path / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True))
        save_file({n: t.contiguous() for n, t in stored.items()}, path / "model.safetensors")
        files = {
            file.name: np.frombuffer(file.read_bytes(), np.uint8) for file in sorted(path.iterdir())
        }
    return {
        **files,
        **dequantised(model),
        "ids": ids,
        "logits": logits_of(model, ids),
        "logits_rounded": expected,
        "settled": settled,
        "versions": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}"),
    }


def main() -> None:
    """Write one file per form, next to this script, from the first seed that is settled enough."""
    torch.set_num_threads(1)
    for name in FORMS:
        for seed in range(100):
            arrays = make(name, seed)
            if arrays is not None:
                break
        else:
            raise SystemExit(f"{name}: no seed is settled enough")
        path = Path(__file__).with_name(f"bitnet-{name}.npz")
        np.savez_compressed(path, **arrays)
        print(path.name, "seed", seed, "settled", int(arrays["settled"].sum()), path.stat().st_size)


if __name__ == "__main__":
    main()
