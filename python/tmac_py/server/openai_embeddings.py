"""Embeddings in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from tmac_py.embedding import Vectors


def embedding_list(
    vectors: Sequence[Vectors], model: str, n_tokens: int, *, in_base64: bool
) -> dict[str, Any]:
    """The answer: a vector for each text, as numbers or as base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": i, "embedding": _encode(vector, in_base64)}
        for i, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def _encode(vector: Vectors, in_base64: bool) -> str | list[float]:
    if in_base64:
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
