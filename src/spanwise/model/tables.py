"""What the parts of a decoder layer are called, and the vocabulary of transformers' own plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedModel

from spanwise.errors import PlanError

AttentionRole = Literal[
    "query", "key", "value", "packed", "per_head", "latent_heads", "out", "whole"
]

# Linears of an attention module by the name of the leaf, in small letters. "packed": queries, keys
# and values side by side; "per_head": one head's three after the other's; "latent_heads": a latent
# expanded to every head; "whole": kept on every rank.
ATTENTION_LINEARS: dict[str, AttentionRole] = {
    "q_proj": "query",
    "q_b_proj": "query",
    "q_attn": "query",
    "wq": "query",
    "gate_proj": "query",
    "g_proj": "query",
    "k_proj": "key",
    "wk": "key",
    "v_proj": "value",
    "wv": "value",
    "qkv_proj": "packed",
    "c_attn": "packed",
    "wqkv": "packed",
    "query_key_value": "per_head",
    "kv_b_proj": "latent_heads",
    "o_proj": "out",
    "c_proj": "out",
    "out_proj": "out",
    "dense": "out",
    "wo": "out",
    "q_a_proj": "whole",
    "kv_a_proj_with_mqa": "whole",
}
# Where an attention module says False to this, its packed projection is by head after all.
PACKED_BY_ROLE = "multi_query"
ATTENTION_NORMS: dict[str, AttentionRole] = {
    "q_norm": "query",
    "q_layernorm": "query",
    "query_layernorm": "query",
    "k_norm": "key",
    "k_layernorm": "key",
    "key_layernorm": "key",
    "attn_sub_norm": "out",
    "q_a_layernorm": "whole",
    "kv_a_layernorm": "whole",
}
# Norms of an MLP between its inner columns and the linear that projects back.
INNER_NORMS = {"ffn_sub_norm"}
# One value for each query head.
ATTENTION_HEAD_PARAMETERS = {"sinks", "gate_bias"}

# Where a module of linears has equal sizes on both sides, the one that projects back.
BACK_PROJECTIONS = {
    "down_proj", "c_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h", "proj_out", "lin2",
}  # fmt: skip

# Linears that choose among experts, or weigh one: a rounding there sends tokens elsewhere.
ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}

# Attributes of attention modules that count heads or columns and follow the rank's share.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "num_q_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
HEAD_COLUMNS = (
    "split_size", "embed_dim", "hidden_size", "all_head_size", "q_size", "inner_dim",
    "d_model_size",
)  # fmt: skip
KV_COLUMNS = ("kv_dim", "kv_size")

# The words of transformers 5.17 to 5.23. What a word says is checked against the module's shape;
# a word that is not here means the plan was written for rules this version does not know.
PLAN_WORDS = {
    "colwise", "rowwise", "colwise_rep", "rowwise_rep", "colwise_gather_output",
    "rowwise_split_input", "packed_colwise", "packed_rowwise", "local_colwise", "local_rowwise",
    "local_packed_rowwise", "local", "gather", "replicate", "replicated",
    "replicated_with_grad_allreduce", "sequence_parallel", "all_reduce", "local_params",
    "embedding_rowwise", "embedding_colwise", "moe_tp_experts", "moe_identity_expert",
    "grouped_gemm", "ep_dispatch_experts", "ep_router", "mla_kv_a_proj",
}  # fmt: skip

# What a failed run says, and what it means to a user.
FAILURES = {
    "meta tensor": "it decides by the values of tensors while it runs",
    "register_meta": "it decides by the values of tensors while it runs",
    "device meta": "it mixes in tensors it makes on the CPU while it runs",
    "Attention mask should be of size": "it computes its attention itself",
    "past_key_values": "it keeps a cache of its own kind, or none",
}


def check_plans(model: PreTrainedModel) -> None:
    """Raise PlanError for a word of the model's own plans that is not known."""
    for name, word in _plan_entries(model):
        if word not in PLAN_WORDS:
            raise PlanError(
                f"the parallel plan of {type(model).__name__} says {word!r} for {name}, which "
                "this version does not know; use a supported transformers version or one device"
            )


def _plan_entries(model: PreTrainedModel) -> Iterable[tuple[str, str]]:
    config = model.config.get_text_config()
    plans = [
        getattr(config, "base_model_tp_plan", None),
        getattr(config, "base_model_ep_plan", None),
        getattr(type(model), "_tp_plan", None),
        getattr(type(model), "_ep_plan", None),
    ]
    for plan in plans:
        yield from (plan or {}).items()
