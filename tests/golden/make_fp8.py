"""Write fp8.npz: a tiny checkpoint of 8-bit floats, and what transformers makes of it.

Needs ``pip install torch transformers``; the tests read the file and need neither.
Run as ``PYTHONPATH=python:tests python tests/golden/make_fp8.py``.

Matrices are e4m3 with a scale per block, as DeepSeek's; "w.<name>" are the float32 matrices that
transformers.integrations.finegrained_fp8 dequantises. "e4m3" and "e5m2" are all 256 numbers of
these types by PyTorch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_bitnet import LLAMA, SIZES, master_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

BLOCK = (8, 4)
"""Divides all shapes, which transformers' dequantisation needs."""


def main() -> None:
    """Write the file next to this script."""
    rng = np.random.default_rng(0)
    fresh = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16)
    stored: dict[str, torch.Tensor] = {}
    arrays: dict[str, Any] = {}
    for name, weight in master_weights(fresh, rng).items():
        if weight.ndim == 1:
            stored[name] = weight.float()
        elif "embed" in name or "lm_head" in name:
            stored[name] = weight
        else:
            m, k = weight.shape
            blocks = weight.float().reshape(m // BLOCK[0], BLOCK[0], k // BLOCK[1], BLOCK[1])
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            small = blocks / scales[:, None, :, None]
            stored[name] = small.reshape(m, k).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
            pair = {"weight": stored[name], "weight_scale_inv": scales}
            if ".layers.1." in name:  # one layer will do
                continue
            arrays[f"w.{name}"] = Fp8Dequantize(None).convert(pair)["weight"].numpy()
    config = {
        **LLAMA.to_diff_dict(),
        **SIZES,
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": BLOCK,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(stored, Path(folder, "model.safetensors"))
        arrays["model.safetensors"] = np.fromfile(Path(folder, "model.safetensors"), np.uint8)
    text = json.dumps(config, indent=1, sort_keys=True).encode()
    arrays["config.json"] = np.frombuffer(text, np.uint8)
    every = torch.arange(256, dtype=torch.uint8)
    arrays["e4m3"] = every.view(torch.float8_e4m3fn).float().numpy()
    arrays["e5m2"] = every.view(torch.float8_e5m2).float().numpy()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    path = Path(__file__).with_name("fp8.npz")
    np.savez_compressed(path, **arrays, versions=np.array(versions))
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
