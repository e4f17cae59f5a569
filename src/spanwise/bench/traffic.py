"""How many bytes a step moves between devices: computed from the layout, not measured."""

from __future__ import annotations

from spanwise.layout.request import Degrees
from spanwise.types.model import ModelFacts

_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TOKEN_ID_BYTES = 8


def decode_step_bytes(
    facts: ModelFacts, degrees: Degrees, num_tokens: int, whole_experts: int | None = None
) -> int:
    """What a replica's devices hand to one another in a decode step of ``num_tokens`` sequences.

    Payloads, each counted once, whatever a collective makes of them (a ring sends 2 (n - 1) / n of
    an all-reduce from every rank). Tensor parallel: two all-reduces of the hidden states in every
    layer, one after the embedding, and the logits gathered (Shoeybi et al. 2019, arXiv:1909.08053,
    forward only). Pipeline: the hidden states at every border, and the drawn tokens back.
    ``whole_experts``, of expert parallelism: how many a token goes to; every layer counts as if it
    had experts, and what is exchanged there holds a product for each of them (where those are many
    bytes, the mixed hidden states are gathered once more, which is not counted). Parts of a model
    that stay whole on every rank (the plan's ``replicated``) move less than is counted here.
    """
    values = _VALUE_BYTES[facts.dtype]
    hidden_bytes = num_tokens * facts.hidden_size * values
    total = 0
    if degrees.tp > 1:
        of_layer = 1 + (1 if whole_experts is None else whole_experts)
        logits_bytes = num_tokens * facts.vocab_size * values
        total += (facts.num_layers * of_layer + 1) * hidden_bytes + logits_bytes
    if degrees.pp > 1:
        total += (degrees.pp - 1) * hidden_bytes + num_tokens * _TOKEN_ID_BYTES
    return total
