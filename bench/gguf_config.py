"""The sizes of a model as a GGUF file says them."""

from __future__ import annotations

from gguf import GGUFWriter

from tmac_py.config import ModelConfig


def add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """What a decoder of Llama's kind needs besides its tensors and tokenizer."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
