"""The architectures of the two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .tokenizer import BOS, EOS, PAD, SPECIAL, VOCABULARY

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": SPECIAL.index(PAD),
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "rms_norm_eps": 1e-6,
    "use_cache": True,
}


def build_dense() -> PreTrainedModel:
    """tiny-dense, of the Llama architecture."""
    return LlamaForCausalLM(LlamaConfig(hidden_size=192, intermediate_size=576, **SHARED))


def build_moe() -> PreTrainedModel:
    """tiny-moe, of the Qwen3-MoE architecture: 8 experts, 2 of them for each token."""
    config = Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        **SHARED,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # the fastest to train on a CPU
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"dense": build_dense, "moe": build_moe}
