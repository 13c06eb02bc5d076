"""Write lora.npz: a tiny model, LoRA adapters as peft saves them, and the weights peft merges.

Needs ``pip install torch transformers peft``; the tests read the file and need none of them.
Run as ``PYTHONPATH=python:tests python tests/golden/make_lora.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=48,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)

ADAPTERS = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"k_proj": 3, "layers.0.mlp.down_proj": 1},
        alpha_pattern={"mlp.up_proj": 10},
    ),
    "rslora": LoraConfig(
        r=5,
        lora_alpha=3,
        target_modules=["lm_head", "o_proj"],
        use_rslora=True,
    ),
}


def contents(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """The configuration and the weights in a folder."""
    return {
        file.name: np.frombuffer(file.read_bytes(), np.uint8)
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors")
    }


def main() -> None:
    """Write the file next to this script."""
    torch.manual_seed(0)
    arrays: dict[str, NDArray[np.generic]] = {}
    with tempfile.TemporaryDirectory() as parent:
        base = Path(parent, "base")
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(base)
        arrays |= {f"base/{name}": content for name, content in contents(base).items()}
        for name, config in ADAPTERS.items():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            for part, parameter in model.named_parameters():
                if "lora_B" in part:  # zero at first
                    parameter.data.normal_(0, 0.05)
            model.peft_config["default"].base_model_name_or_path = "base"
            folder = Path(parent, name)
            model.save_pretrained(folder, save_embedding_layers=False)
            arrays |= {f"{name}/{file}": content for file, content in contents(folder).items()}
            targets = {part.split(".lora_A")[0] for part in model.state_dict() if ".lora_A" in part}
            prefix = "base_model.model."
            merged = model.merge_and_unload().state_dict()
            for target in sorted(targets):
                key = target.removeprefix(prefix) + ".weight"
                arrays[f"{name}/merged/{key}"] = merged[key].float().numpy()
    tools = (torch, transformers, peft)
    arrays["versions"] = np.array([f"{m.__name__} {m.__version__}" for m in tools])
    path = Path(__file__).with_name("lora.npz")
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, "bytes,", len(arrays), "arrays")


if __name__ == "__main__":
    main()
