"""Every causal language model of transformers: the right tokens when cut, or one line why not."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tests.support.compare import LOGIT_TOLERANCE, Reference, worst_difference
from tests.support.replica import Replica
from tests.support.tiny_models import VOCAB, draw_weights, reference
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from spanwise.errors import ModelError
from spanwise.model.build import build_on_meta
from spanwise.model.probe import probe
from spanwise.types.sampling import SamplingSpec

NUM_TOKENS = 8
PROMPT_LENGTHS = (1, 6, 13, 26)
NUM_LAYERS = 4
# Set where a config has the field. Widths are odd so that no split is even.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 37),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_rope_head_dim"), 8),
    "num_key_value_heads": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 19),
    **dict.fromkeys(
        (
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        23,
    ),
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "sliding_window": 7,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias"), True),
}
MLA = {"num_key_value_heads": 8, "head_dim": None}
WIDE_HEADS = {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}}
TWO_ROTARIES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# model_type, or model_type:variant, and what of its config is not as above.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": MLA,
    "beam": {},
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere:head norms": {"use_qk_norm": True},
    "cohere2": {},
    "cohere2_moe": {},
    "cohere_compass_text": {
        "rope_parameters": TWO_ROTARIES,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "ctrl": {"dff": 37},
    "cwm": {},
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v2:no query latent": {**MLA, "topk_method": "greedy", "q_lora_rank": None},
    "deepseek_v3": MLA,
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "fuyu": {},
    "gemma": {},
    "gemma2": {},
    "gemma3": {
        "vision_config": {**VISION, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
        "boi_token_index": 128,
        "eoi_token_index": 129,
    },
    "gemma3_text": {"rope_parameters": TWO_ROTARIES},
    "gemma3n_text": {
        "intermediate_size": [37] * NUM_LAYERS,
        "activation_sparsity_pattern": [0.0] * NUM_LAYERS,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
    },
    "gemma4": {
        "text_config": {**WIDE_HEADS, "hidden_size_per_layer_input": 0},
        "vision_config": VISION,
        "audio_config": None,
    },
    "gemma4:inputs per layer": {
        "text_config": {**WIDE_HEADS, "use_bidirectional_attention": "vision"},
        "vision_config": VISION,
        "audio_config": None,
    },
    "gemma4_text": WIDE_HEADS,
    "gemma4_text:plain layers": {**WIDE_HEADS, "hidden_size_per_layer_input": 0},
    "gemma4_text:experts": {
        **WIDE_HEADS,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
    },
    "gemma4_unified_text": WIDE_HEADS,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "got_ocr2": {
        "vision_config": {
            **VISION,
            "mlp_dim": 16,
            "output_channels": 16,
            "global_attn_indexes": [0],
        }
    },
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_bigcode:all heads": {"multi_query": False},
    "gpt_neox": {},
    "gpt_neox:one after the other": {"use_parallel_residual": False},
    "gpt_oss": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_dense:alpha": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    },
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2": {"layer_types": ["full_attention"] * NUM_LAYERS},
    "llama": {},
    "llama:no biases, tied": {
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    "llama:wide heads": {"head_dim": 24, "num_key_value_heads": 2},
    "llama:one kv head": {"num_key_value_heads": 1},
    "llama:yarn": {"rope_parameters": YARN},
    "llama:llama3": {"rope_parameters": LLAMA3},
    "llama:linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama:dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    },
    "llama:longrope": {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 6.0],
            "original_max_position_embeddings": 22,
            "factor": 16.0,
        },
    },
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": MLA,
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {
        "rope_parameters": {
            **YARN,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "moss_transcribe_diarize": {
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
        }
    },
    "nanochat": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {"qk_layernorm": True},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "roberta": {"is_decoder": True},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "stablelm:parallel, head norms": {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": {},
    "vaultgemma": {},
    "whisper": {
        "decoder_layers": NUM_LAYERS,
        "decoder_attention_heads": 8,
        "decoder_ffn_dim": 37,
        "encoder_attention_heads": 8,
    },
    "youtu": MLA,
}
MIXTURES = {
    "afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "deepseek_v2",
    "deepseek_v2:no query latent", "deepseek_v3", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4_text:experts", "glm4_moe",
    "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2",
    "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
}  # fmt: skip
# Not cut into stages, by part of the reason; they run on one.
ONE_STAGE = {
    "beam": "attention_scaling",
    "gemma3n_text": "second",
    "gemma4_text": "second",
    "gemma4:inputs per layer": "second",
}
# What stays whole under tensor parallelism.
WHOLE = {
    "bert": "attention.self",
    "roberta": "attention.self",
    "stablelm:parallel, head norms": "self_attn",
}

# Refused, or broken in transformers itself, in versions before the newest.
NEW_FORMS = {"aria_text", "cohere_compass_text"}
NEWEST = Version("5.23")

LAYOUTS = {
    "pp2-tp3": (2, 3, False),
    "1": (1, 1, False),
    "tp2": (1, 2, False),
    "tp8": (1, 8, False),
    "pp4": (4, 1, False),
    "pp2-ep3": (2, 3, True),
}
QUICK = "pp2-tp3"


def is_known(name: str) -> bool:
    """Whether the transformers at hand has the type, and in a form that runs."""
    model_type = name.partition(":")[0]
    is_new = Version(transformers.__version__) >= NEWEST
    return model_type in CONFIG_MAPPING and (is_new or model_type not in NEW_FORMS)


def tiny_values(config: PretrainedConfig) -> dict[str, Any]:
    """The tiny values a config has fields for, its own kinds of layers taken in turn."""
    fields = {k for k in config.to_dict() if k not in type(config).attribute_map}
    values = {name: value for name, value in TINY.items() if name in fields}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(config, name, None) or ()))
        if kinds:
            values[name] = list(itertools.islice(itertools.cycle(kinds), NUM_LAYERS))
    text = getattr(config, "text_config", None)
    if isinstance(text, PretrainedConfig):
        values["text_config"] = {**text.to_dict(), **tiny_values(text)}
    return values


def tiny(name: str, changes: dict[str, Any]) -> PretrainedConfig:
    model_type = name.partition(":")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = tiny_values(AutoConfig.for_model(model_type))
        if "text_config" in changes:
            changes = {
                **changes,
                "text_config": {**values["text_config"], **changes["text_config"]},
            }
        values |= changes
        left = {k: v for k, v in values.items() if v is not None or k == "q_lora_rank"}
        return AutoConfig.for_model(model_type, **left)


def saved(name: str, folder: Path) -> Reference:
    """A tiny model of an architecture in a folder, and what transformers makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny(name, ARCHITECTURES[name]), attn_implementation="eager", dtype=torch.float32
        )
        draw_weights(model, seed=0)
        for module in model.modules():
            if isinstance(config := getattr(module, "config", None), PretrainedConfig):
                config._experts_implementation = "eager"
        model.generation_config.forced_eos_token_id = None
        model.eval().save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            for length in PROMPT_LENGTHS
        ]
        answers = [reference(model, prompt, NUM_TOKENS) for prompt in prompts]
    return Reference(
        folder,
        prompts,
        [tokens for tokens, _ in answers],
        [logits.log_softmax(-1) for _, logits in answers],
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if layout == QUICK else pytest.mark.full)
        for name in ARCHITECTURES
        for layout, (*_, whole_experts) in LAYOUTS.items()
        if is_known(name) and (name in MIXTURES or not whole_experts)
    ],
)
def test_the_tokens_of_transformers(name: str, layout: str, tmp_path: Path) -> None:
    pp, tp, whole_experts = LAYOUTS[layout]
    right = saved(name, tmp_path)
    replica = Replica(
        right.folder, pp=1 if name in ONE_STAGE else pp, tp=tp, expert_parallel=whole_experts
    )
    tokens, logprobs = replica.generate(
        right.prompts, NUM_TOKENS, [SamplingSpec(logprobs=VOCAB)] * len(right.prompts)
    )
    assert tokens == right.tokens
    assert worst_difference(tokens, logprobs, right) < LOGIT_TOLERANCE
    assert ONE_STAGE.get(name, "") in replica.facts.pipeline_refusal
    assert bool(replica.facts.pipeline_refusal) == (name in ONE_STAGE)
    assert bool(replica.facts.num_experts) == (name in MIXTURES)
    left_whole = [part for shard in replica.shards for part in shard.cut.replicated]
    assert all(name in WHOLE and WHOLE[name] in part for part in left_whole)


STATE = "keeps convolution, recurrent or indexer state"
NO_INTERFACE = "does not use the attention interface"
OWN_POSITIONS = "counts positions by itself"
MASK = "neither causal nor a sliding window"
VALUES = "decides by the values of tensors"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": (OWN_POSITIONS, {}),
    "bert": (MASK, {}),
    "blenderbot": (OWN_POSITIONS, {}),
    "bloom": (NO_INTERFACE, {}),
    "codegen": (NO_INTERFACE, {}),
    "dbrx": (
        VALUES,
        {
            "n_heads": 8,
            "n_layers": NUM_LAYERS,
            "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 37, "moe_num_experts": 8, "hidden_size": 64},
        },
    ),
    "deepseek_v32": (STATE, MLA),
    "diffllama": ("attends without storing keys and values", {}),
    "doge": (MASK, {}),
    "falcon": (NO_INTERFACE, {}),
    "hrm_text": ("attend more than once", {}),
    "gpt_neo": (NO_INTERFACE, {"attention_types": [[["global", "local"], 2]]}),
    "gptj": (NO_INTERFACE, {}),
    "granitemoehybrid": (STATE, {}),
    "jetmoe": (VALUES, {}),
    "lfm2": (STATE, {"layer_types": ["full_attention", "conv"] * 2}),
    "llama4_text": (MASK, {}),
    "longcat_flash": (VALUES, {"num_key_value_heads": 8}),
    "marian": (OWN_POSITIONS, {}),
    "mbart": (OWN_POSITIONS, {}),
    "minimax": ("a cache of its own", {}),
    "moshi": ("sliding_window in its cache", {"ffn_dim": 44}),
    "mpt": (NO_INTERFACE, {}),
    "nemotron_h": (STATE, {}),
    "openai-gpt": (NO_INTERFACE, {}),
    "pegasus": (OWN_POSITIONS, {}),
    "qwen3_next": (STATE, {}),
    "rwkv": (NO_INTERFACE, {}),
    "xglm": ("computes its attention itself", {}),
    "reformer": ("cannot be built", {}),
    "zamba": (STATE, {}),
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in CONFIG_MAPPING])
def test_what_is_not_supported_says_why_in_one_line(name: str) -> None:
    reason, changes = REFUSED[name]
    with pytest.raises(ModelError, match=reason) as refusal:
        probe(build_on_meta(tiny(name, changes), torch.float32))
    assert "\n" not in str(refusal.value)
