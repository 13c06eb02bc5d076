"""The C++ core: packing, lookup-table products, the decoder step."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

__version__: str
compiler: str

class IsaInfo(TypedDict):
    name: str
    built: bool
    usable: bool
    active: bool
    reason: str

def isas() -> list[IsaInfo]: ...
def use_isa(name: str) -> None: ...
def active_isa() -> str: ...

OffsetKind = Literal["none", "offset", "zero"]
Tables = Literal["int8", "exact", "exact8"]
KvType = Literal["f16", "int8", "int4"]
Encoding = Literal["uniform", "ternary", "bcq"]

def packed_nbytes(
    m: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    offset_kind: OffsetKind,
    encoding: Encoding = "uniform",
    scale: float | None = None,
) -> int: ...
def pack(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16] | None = None,
    offsets: NDArray[np.float16] | None = None,
    *,
    bits: int,
    group_size: int,
    offset_kind: OffsetKind,
    encoding: Encoding = "uniform",
    scale: float | None = None,
    tiles: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]: ...
def unpack(
    packed: NDArray[np.uint8],
    *,
    m: int,
    k: int,
    bits: int,
    group_size: int,
    offset_kind: OffsetKind,
    encoding: Encoding = "uniform",
    scale: float | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float16] | None, NDArray[np.float16] | None]: ...
def unpack_streams(
    words: NDArray[np.integer[Any]],
    out: NDArray[np.uint8],
    *,
    bits: int,
    order: NDArray[np.int32] | None = None,
) -> None: ...
def unpack_nibble_rows(
    words: NDArray[np.integer[Any]], out: NDArray[np.uint8], which: Sequence[int]
) -> None: ...
def unpack_runs(packed: NDArray[np.uint8], run: int, bits: int) -> NDArray[np.uint8]: ...
def group_ranges(w: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def nearest_codes(
    w: NDArray[np.float32],
    scales: NDArray[np.float16],
    offsets: NDArray[np.float16] | None = None,
    *,
    zero: float,
    bits: int,
) -> NDArray[np.uint8]: ...

class Linear:
    def __init__(
        self,
        packed: NDArray[np.uint8],
        *,
        m: int,
        k: int,
        bits: int,
        group_size: int,
        offset_kind: OffsetKind,
        zero: float,
        encoding: Encoding = "uniform",
        scale: float | None = None,
        order: NDArray[np.int32] | None = None,
    ) -> None: ...
    @property
    def m(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

def read_bandwidth(nbytes: int, pool: ThreadPool) -> float: ...
def multiply_peak(pool: ThreadPool) -> float: ...
def linear_forward(
    linear: Linear, x: NDArray[np.float32], pool: ThreadPool, *, tables: Tables
) -> NDArray[np.float32]: ...

OptionalTensor = Literal[
    "attention_out_norm",
    "feed_forward_out_norm",
    "q_norm",
    "k_norm",
    "q_full_norm",
    "k_full_norm",
    "attn_sub_norm",
    "ffn_sub_norm",
    "q_bias",
    "k_bias",
    "v_bias",
    "o_bias",
    "router",
]
FeedForwardBias = Literal["gate_bias", "up_bias", "down_bias"]

class OptionalTensors(TypedDict, total=False):
    attention_out_norm: NDArray[np.float32]
    feed_forward_out_norm: NDArray[np.float32]
    q_norm: NDArray[np.float32]
    k_norm: NDArray[np.float32]
    q_full_norm: NDArray[np.float32]
    k_full_norm: NDArray[np.float32]
    attn_sub_norm: NDArray[np.float32]
    ffn_sub_norm: NDArray[np.float32]
    q_bias: NDArray[np.float32]
    k_bias: NDArray[np.float32]
    v_bias: NDArray[np.float32]
    o_bias: NDArray[np.float32]
    router: NDArray[np.float32]

class FeedForwardBiases(TypedDict, total=False):
    gate_bias: NDArray[np.float32]
    up_bias: NDArray[np.float32]
    down_bias: NDArray[np.float32]

class FeedForwardTensors(FeedForwardBiases):
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

class LayerTensors(OptionalTensors):
    input_norm: NDArray[np.float32]
    feed_forward_norm: NDArray[np.float32]
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    feed_forwards: list[FeedForwardTensors]
    sliding_window: int
    rope: int

class RopeTables(TypedDict):
    inv_freq: NDArray[np.float32]
    attention_scale: float
    long_inv_freq: NDArray[np.float32] | None
    original_context: int

class StepTimes:
    """Adds up what the parts of steps take."""

    def __init__(self) -> None: ...
    @property
    def seconds(self) -> dict[str, float]: ...

class Decoder:
    """Const weights of one model; shared by every cache and thread."""

    def __init__(
        self,
        *,
        embed_tokens: Linear,
        lm_head: Linear,
        final_norm: NDArray[np.float32],
        layers: Sequence[LayerTensors],
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        rms_norm_eps: float,
        query_scalar: float,
        attention_softcap: float,
        logits_softcap: float,
        embedding_scale: float,
        activation: str,
        clip_qkv: float,
        experts_per_token: int,
        normalize_experts: bool,
        ropes: Sequence[RopeTables],
        tables: Tables,
        head_tables: Tables,
    ) -> None: ...
    @property
    def vocab_size(self) -> int: ...
    def forward(
        self,
        batch: list[tuple[NDArray[np.int32], KvCache]],
        pool: ThreadPool,
        *,
        logits: Literal["last", "all"] = "last",
        times: StepTimes | None = None,
    ) -> NDArray[np.float32]: ...
    def hidden_states(
        self, batch: list[tuple[NDArray[np.int32], KvCache]], pool: ThreadPool
    ) -> NDArray[np.float32]: ...

class KvCache:
    """Keys and values of one sequence."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        n_ctx: int,
        keys: KvType = "f16",
        values: KvType = "f16",
    ) -> None: ...
    @property
    def pos(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def keys(self) -> KvType: ...
    @property
    def values(self) -> KvType: ...
    def fork(self, n_ctx: int = 0) -> KvCache: ...
    def state(self) -> NDArray[np.uint8]: ...
    def restore(self, state: NDArray[np.uint8]) -> None: ...
    def truncate(self, pos: int) -> None: ...

class Sampler:
    """Chooses tokens. Holds the random state; one thread at a time."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: Sequence[tuple[int, float]],
        state: tuple[int, int],
        increment: tuple[int, int],
    ) -> None: ...
    def sample(self, logits: NDArray[np.float32], recent: Sequence[int]) -> tuple[int, float]: ...
    def distribution(
        self, logits: NDArray[np.float32], recent: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
    def draw(self, shares: NDArray[np.float64]) -> int: ...
    def uniform(self) -> float: ...

def sample_rows(
    rows: list[tuple[Sampler, NDArray[np.float32], Sequence[int]]], pool: ThreadPool
) -> list[tuple[int, float] | str]: ...
def log_probability(logits: NDArray[np.float32], id: int) -> float: ...
def most_likely(logits: NDArray[np.float32], k: int) -> list[tuple[int, float]]: ...
