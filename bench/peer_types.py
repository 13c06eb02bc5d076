"""Number formats of ggml that stand beside ours. Read by the worker too: no imports."""

from __future__ import annotations

_COMMON = {
    "Q4_0": 2,
    "Q5_0": 6,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
}

TYPE_IDS: dict[str, dict[str, int]] = {
    "llama_cpp": {**_COMMON, "TQ1_0": 34, "TQ2_0": 35, "Q1_0": 41},
    "ik_llama_cpp": {
        **_COMMON,
        "Q1_0_G128": 41,
        "IQ1_BN": 134,
        "IQ2_BN": 135,
        "IQ2_K": 137,
        "IQ3_K": 138,
        "IQ4_KS": 144,
    },
}
"""ggml's numbers of the types, by package."""

TERNARY_TYPES = ("TQ1_0", "TQ2_0", "IQ1_BN", "IQ2_BN")
"""For weights that are -1, 0 or 1 times a scale, which they store exactly."""

TYPES_OF_ENCODING: dict[str, tuple[str, ...]] = {
    "1": ("Q1_0", "Q1_0_G128"),
    "ternary": TERNARY_TYPES,
    "2": ("Q2_K", "TQ2_0", "IQ2_K"),
    "3": ("Q3_K", "IQ3_K"),
    "4": ("Q4_0", "Q4_K", "IQ4_NL", "IQ4_KS"),
    "5": ("Q5_0", "Q5_K"),
    "6": ("Q6_K",),
    "7": (),
    "8": ("Q8_0",),
}
"""What competes with which of our encodings."""

PREFILL_TYPES = ("Q3_K", "Q4_K", "Q4_0", "IQ4_KS")
"""The fastest types of any bits with many tokens: they join every encoding there."""
