"""Tiny random models of many families, drawn so that an error in any part changes tokens.

Default initialisation hides most errors: zero biases, unit norms, and matrices so small that
layers hardly matter. Here every bias and norm is random, matrices have about 1.5/sqrt(fan_in), so
scores reach soft caps and windows and sinks decide tokens.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 40,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 37, "tie_word_embeddings": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 7},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 12.0,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "hidden_size": 64,
        "rope_parameters": LONG_ROPE,
        "original_max_position_embeddings": 40,
    },
    "olmo2": {"hidden_size": 64},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
        "norm_topk_prob": True,
        "head_dim": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 13,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "num_key_value_heads": 8,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model of a family."""
    values = {**COMMON, **FAMILIES.get(family, {}), **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoConfig.for_model(family, **values)


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter and persistent buffer with values that make errors show."""
    generator = torch.Generator().manual_seed(seed)
    centred = "gemma" in model.config.model_type
    for name, tensor in model.state_dict(keep_vars=True).items():
        noise = torch.randn(tensor.shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if tensor.dim() >= 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            transposed = "c_attn" in name or "c_proj" in name or "c_fc" in name
            transposed = transposed or (model.config.model_type == "gpt_oss" and tensor.dim() == 3)
            fan_in = tensor.shape[-2] if transposed else tensor.shape[-1]
            value = noise * 1.5 / fan_in**0.5
        elif tensor.dim() >= 2:
            value = noise
        elif "norm" in name or "ln_" in name:
            value = noise * 0.3 + (0.0 if centred or leaf == "bias" else 1.0)
        else:
            value = noise * 0.5
        tensor.data.copy_(value)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random fp32 model of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **changes), attn_implementation="eager", dtype=torch.float32
        )
    draw_weights(model, seed)
    # The grouped kernels want sizes in multiples of 16 bytes; the loop over experts any.
    model.config._experts_implementation = "eager"
    return model.eval()


def save_tiny_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny model as a Hugging Face folder and return it."""
    model = tiny_model(family, seed, **changes)
    model.generation_config.eos_token_id = 1
    model.generation_config.do_sample = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def prompts(count: int = 8, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, from a single token up, none of them special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 2, 5, 8, 13, 17, 23, 30]
    return [
        torch.randint(3, VOCAB, (lengths[i % len(lengths)],), generator=generator).tolist()
        for i in range(count)
    ]


@torch.no_grad()
def reference(
    model: PreTrainedModel, prompt: list[int], max_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of ``generate`` alone, and the logits ``[tokens, vocab]`` they came from."""
    # Where long-RoPE changes its factors, cached `generate` of transformers 5.17 drops its cache
    # and then feeds the last token only; without a cache every version computes the whole prompt.
    switches = getattr(model.config, "original_max_position_embeddings", None) is not None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        use_cache=not switches,
        eos_token_id=None,
        pad_token_id=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()
