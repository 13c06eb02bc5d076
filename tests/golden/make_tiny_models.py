"""Write tiny-*.npz: tiny decoders as transformers saves them, and the logits it computes.

Needs ``pip install torch transformers``; the tests read the files and need neither.
Run as ``PYTHONPATH=python:tests python tests/golden/make_tiny_models.py``.

Weights are codes of 8 bits times a short fp16 scale per group, so that the converter's 8 bits hold
them exactly: what the tests compare is the decoder, not its quantisation. Besides the plain float32
logits ("logits"), transformers computes others with the decoder's documented roundings in place:
products by tables as tests/reference.py defines them, keys and values rounded to fp16. With int8
tables these are stored too ("logits_int8"), and the positions where they do not hang on a rounding
that is too close to call ("settled"): a decoder that rounds at the same places agrees there to
float32 round-off. With exact tables only the largest distance from the plain ones is
("exact_error").
"""

from __future__ import annotations

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
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from reference import multiply
from tmac_py.quant import QuantTensor, quantize_rtn

N_IDS = 48

ROUND_OFF = 2.0**-22
"""Relative noise of float32 sums, with something to spare."""

N_TRIALS = 12
"""Draws of the noise."""

SETTLED = 2e-5
"""Positions whose logits such noise moves less than this have no rounding that could go either way,
neither there nor where they attend to."""

ENOUGH = 33
"""Positions out of N_IDS that must be settled; seeds are tried until they are."""

COMMON = {
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
}

LLAMA3 = LlamaConfig(
    **COMMON,
    hidden_size=48,
    intermediate_size=68,
    num_key_value_heads=2,
    head_dim=20,
    vocab_size=128,
    tie_word_embeddings=True,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
LINEAR = LlamaConfig(
    **COMMON,
    hidden_size=72,
    intermediate_size=100,
    num_key_value_heads=1,
    head_dim=12,
    vocab_size=97,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
)
MISTRAL = MistralConfig(
    **{**COMMON, "num_hidden_layers": 3},
    hidden_size=40,
    intermediate_size=72,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    tie_word_embeddings=False,
    sliding_window=7,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)
YARN = LlamaConfig(
    **{**COMMON, "num_attention_heads": 2},
    hidden_size=56,
    intermediate_size=60,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=96,
    tie_word_embeddings=True,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
        "beta_fast": 2.0,
        "beta_slow": 0.25,
    },
)
DYNAMIC = LlamaConfig(
    **{**COMMON, "rms_norm_eps": 0.01},
    hidden_size=48,
    intermediate_size=64,
    num_key_value_heads=4,
    head_dim=12,
    vocab_size=100,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 2000.0, "factor": 2.0},
)

MODELS: dict[str, tuple[LlamaConfig | MistralConfig, torch.dtype, int]] = {
    "llama3": (LLAMA3, torch.float16, 32),
    "linear": (LINEAR, torch.bfloat16, 20),
    "mistral": (MISTRAL, torch.float16, 16),
    "yarn": (YARN, torch.bfloat16, -1),
    "dynamic": (DYNAMIC, torch.float16, 12),
}
"""name -> configuration, dtype of the weights, group size"""


def on_a_grid(
    rng: np.random.Generator, shape: tuple[int, int], group_size: int, size: float, steps: range
) -> NDArray[np.float32]:
    """Random weights [m, k] of about ``size`` that 8 bits per group of ``group_size`` hold exactly.

    Every group has a scale, one of ``steps`` times a power of two, codes from -127 to 127, and one
    code of -128, from which a symmetric quantisation finds the scale again.
    """
    m, k = shape
    group = k if group_size == -1 else min(group_size, k)
    starts = range(0, k, group)
    codes = rng.integers(-127, 128, shape)
    for start in starts:
        codes[np.arange(m), rng.integers(start, min(start + group, k), m)] = -128
    unit = 2.0 ** np.round(np.log2(size / (74 * np.mean(steps))))  # 74: deviation of the codes
    scales = rng.choice(steps, (m, len(starts))) * rng.choice([-unit, unit], (m, len(starts)))
    weights: NDArray[np.float32] = codes * np.repeat(scales, group, axis=1)[:, :k]
    return weights.astype(np.float32)


def fill(model: PreTrainedModel, group_size: int, rng: np.random.Generator) -> None:
    """Weights that let attention choose, in the model's dtype without loss."""
    steps = (
        range(8, 16) if model.dtype == torch.float16 else range(1, 2)
    )  # significands: 11, 8 bits
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            values = rng.normal(1, 0.2, parameter.shape).astype(np.float32)
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            size = 0.4 if "embed" in name else gain / parameter.shape[1] ** 0.5
            values = on_a_grid(rng, tuple(parameter.shape), group_size, size, steps)
        parameter.data = torch.from_numpy(values).to(model.dtype)


def table_product(
    quantised: QuantTensor, tables: str, noise: np.random.Generator | None, x: torch.Tensor
) -> torch.Tensor:
    """``x`` [1, n, k], with round-off if asked for, times the matrix by tables."""
    rows = x[0].numpy()
    if noise is not None:
        rows = rows * (1 + ROUND_OFF * noise.normal(size=rows.shape)).astype(np.float32)
    products = [multiply(quantised, row, tables) for row in rows]
    return torch.from_numpy(np.stack(products).astype(np.float32))[None]


@contextmanager
def rounded(
    model: PreTrainedModel, group_size: int, tables: str, noise: np.random.Generator | None = None
) -> Iterator[None]:
    """Within: products by tables, keys and values in fp16, as the decoder has them."""
    module = sys.modules[type(model).__module__]
    attend: Callable[..., Any] = module.eager_attention_forward

    def attend_to_halves(
        layer: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        return attend(layer, query, key.half().float(), value.half().float(), *rest, **named)

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "eager_attention_forward", attend_to_halves))
        for linear in model.modules():
            if isinstance(linear, torch.nn.Linear):
                weight = linear.weight.detach().numpy()
                quantised = quantize_rtn(weight, bits=8, group_size=group_size)
                assert np.array_equal(quantised.dequantize(), weight)
                product = partial(table_product, quantised, tables, noise)
                stack.enter_context(patch.object(linear, "forward", product))
        yield


def logits_of(model: PreTrainedModel, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32 [n, vocab]"""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None].long()).logits[0].numpy()
    return logits


def make(name: str, seed: int) -> dict[str, NDArray[Any]] | None:
    """The arrays of one file, or None where too many positions of this seed hang on a rounding."""
    config, dtype, group_size = MODELS[name]
    rng = np.random.default_rng(seed)
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(fresh, group_size, rng)
    ids = rng.integers(0, config.vocab_size, N_IDS).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder)
        files = {
            file.name: np.frombuffer(file.read_bytes(), np.uint8)
            for file in sorted(Path(folder).iterdir())
        }
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    with rounded(model, group_size, "int8"):
        int8 = logits_of(model, ids)
    settled = np.ones(N_IDS, bool)
    for trial in range(N_TRIALS):
        with rounded(model, group_size, "int8", np.random.default_rng(trial)):
            settled &= np.abs(logits_of(model, ids) - int8).max(axis=1) < SETTLED
        if settled.sum() < ENOUGH:
            return None
    with rounded(model, group_size, "exact"):
        exact = logits_of(model, ids)
    plain = logits_of(model, ids)
    return {
        **files,
        "ids": ids,
        "group_size": np.int64(group_size),
        "logits": plain,
        "logits_int8": int8,
        "settled": settled,
        "exact_error": np.abs(exact - plain).max(),
        "versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, transformers)]),
    }


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or MODELS:
        arrays, seed = None, -1
        while arrays is None:
            seed += 1
            arrays = make(name, seed)
        path = Path(__file__).parent / f"tiny-{name}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path.name}: seed {seed}, {path.stat().st_size} bytes, logits of "
            f"{arrays['logits'].std():.2f}, {arrays['settled'].sum()} settled positions, "
            f"exact tables move logits by up to {arrays['exact_error']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
