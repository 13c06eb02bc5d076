"""From the tensors of a .lut file to the decoder in the core."""

from __future__ import annotations

from tmac_py import _core
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile
from tmac_py.packing import open_linear
from tmac_py.spec import Tables


def build_decoder(file: LutFile, tables: Tables) -> _core.Decoder:
    """The C++ decoder over the mapped tensors of ``file``, which it keeps alive.

    With tied embeddings embed_tokens and lm_head are one object.

    Raises:
        ModelFileError: a tensor does not fit the core.
    """
    config = file.config

    def linear(name: str) -> _core.Linear:
        packed, spec = file.linear(f"{name}.weight")
        try:
            return open_linear(packed, spec, file.order(f"{name}.weight"))
        except ValueError as error:
            raise ModelFileError(f"{file.path}: tensor {name}.weight: {error}") from error

    def layer(index: int) -> _core.LayerTensors:
        prefix = f"model.layers.{index}."
        return {
            "input_norm": file.float(f"{prefix}input_layernorm.weight"),
            "post_attention_norm": file.float(f"{prefix}post_attention_layernorm.weight"),
            "q_proj": linear(f"{prefix}self_attn.q_proj"),
            "k_proj": linear(f"{prefix}self_attn.k_proj"),
            "v_proj": linear(f"{prefix}self_attn.v_proj"),
            "o_proj": linear(f"{prefix}self_attn.o_proj"),
            "gate_proj": linear(f"{prefix}mlp.gate_proj"),
            "up_proj": linear(f"{prefix}mlp.up_proj"),
            "down_proj": linear(f"{prefix}mlp.down_proj"),
        }

    embed_tokens = linear("model.embed_tokens")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    inv_freq, attention_scale = config.rope()
    return _core.Decoder(
        embed_tokens=embed_tokens,
        lm_head=embed_tokens if config.tie_word_embeddings else linear("lm_head"),
        final_norm=file.float("model.norm.weight"),
        layers=[layer(i) for i in range(config.num_hidden_layers)],
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        inv_freq=inv_freq,
        rope_attention_scale=attention_scale,
        sliding_window=config.sliding_window,
        tables=tables,
        head_tables=_head_tables(file, f"{head}.weight", tables),
    )


def _head_tables(file: LutFile, head: str, tables: Tables) -> Tables:
    """In BitNet the inputs of its ternary matrices are rounded to 8 bits, those of others are not.

    Ma et al., 2024 (arXiv 2402.17764), section 2: lm_head is no BitLinear.
    """
    _, spec = file.linear(head)
    if tables == "exact8" and file.config.activation_bits == 8 and spec.encoding != "ternary":
        return "exact"
    return tables
