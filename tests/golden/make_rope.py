"""Write rope.json: inverse frequencies as transformers 5.23 (torch 2.13) computes them.

Needs ``pip install torch transformers``; the tests read the JSON and need neither.
Run from anywhere: ``python tests/golden/make_rope.py``.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "default": (64, 100000.0, 8192, None),
    "default-odd-theta": (48, 10007.5, 2048, None),
    "linear": (128, 10000.0, 16384, {"type": "linear", "factor": 4.0}),
    "dynamic": (128, 10000.0, 4096, {"type": "dynamic", "factor": 2.0}),
    "llama3.1": (128, 500000.0, 131072, LLAMA3),
    "llama3.2": (64, 500000.0, 131072, {**LLAMA3, "factor": 32.0}),
    "yarn": (
        128,
        1000000.0,
        131072,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn-all-keys": (
        64,
        10000.0,
        163840,
        {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
    ),
    "yarn-attention-factor": (
        64,
        10000.0,
        8192,
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
    ),
    "yarn-degenerate-range": (
        32,
        10000.0,
        64,
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
    ),
}


def main() -> None:
    """Compute every case with transformers' own rotary embedding module."""
    cases = []
    for name, (head_dim, theta, context, scaling) in CASES.items():
        config = {
            "model_type": "llama",
            "hidden_size": 2 * head_dim,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": head_dim,
            "vocab_size": 16,
            "max_position_embeddings": context,
            "rope_theta": theta,
            "rope_scaling": scaling,
        }
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(config))))
        cases.append(
            {
                "name": name,
                "config": config,
                "inv_freq": rotary.inv_freq.to(torch.float64).tolist(),
                "attention_scale": float(rotary.attention_scaling),
            }
        )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("rope.json").write_text(text)


if __name__ == "__main__":
    main()
