"""What changes logits before any is drawn: bias, minimum length, penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from spanwise.types.sampling import SamplingSpec


def adjust(
    logits: torch.Tensor, spec: SamplingSpec, token_ids: Sequence[int], num_prompt: int
) -> None:
    """Change one row's logits [vocab] (fp32) in place, in vLLM's order.

    Bias, minimum length, repetition penalty (over prompt and output, Keskar et al. 2019 as
    transformers has it), frequency and presence penalty (over the output).
    """
    _bias(logits, spec)
    if len(token_ids) - num_prompt < spec.min_tokens:
        _forbid(logits, spec.stop_token_ids)
    if spec.repetition_penalty != 1.0 and len(token_ids):
        _penalise_repetition(logits, spec.repetition_penalty, token_ids)
    if (spec.frequency_penalty or spec.presence_penalty) and len(token_ids) > num_prompt:
        _penalise_output(logits, spec, token_ids[num_prompt:])


def needs_adjusting(spec: SamplingSpec) -> bool:
    """Whether ``adjust`` could change anything for this sequence; only then are tokens read."""
    return bool(
        spec.logit_bias
        or (spec.min_tokens and spec.stop_token_ids)
        or spec.repetition_penalty != 1.0
        or spec.frequency_penalty
        or spec.presence_penalty
    )


def _bias(logits: torch.Tensor, spec: SamplingSpec) -> None:
    if not spec.logit_bias:
        return
    ids = torch.tensor(list(spec.logit_bias), device=logits.device)
    logits[ids] += torch.tensor(list(spec.logit_bias.values()), device=logits.device)


def _forbid(logits: torch.Tensor, token_ids: Sequence[int]) -> None:
    # A model may name an end token that its vocabulary does not reach; it cannot be drawn anyway.
    ids = [token_id for token_id in token_ids if token_id < logits.shape[0]]
    logits[torch.tensor(ids, dtype=torch.long, device=logits.device)] = -torch.inf


def _penalise_repetition(logits: torch.Tensor, penalty: float, token_ids: Sequence[int]) -> None:
    # Each id once, so that writing by index has one outcome.
    ids = torch.tensor(list(set(token_ids)), device=logits.device)
    seen = logits[ids]
    logits[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _penalise_output(logits: torch.Tensor, spec: SamplingSpec, output_ids: Sequence[int]) -> None:
    found = Counter(output_ids)
    ids = torch.tensor(list(found), device=logits.device)
    counts = torch.tensor(list(found.values()), dtype=logits.dtype, device=logits.device)
    logits[ids] -= spec.frequency_penalty * counts + spec.presence_penalty
