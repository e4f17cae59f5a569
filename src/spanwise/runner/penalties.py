"""What changes logits before any is drawn: bias, minimum length, penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from spanwise.types.sampling import SamplingSpec

# Row and token of each logit, and numbers for what is done to it; in the order in which it is done.
_NO_CHANGES = tuple(torch.empty(width, 0, dtype=torch.float64) for width in (3, 2, 3, 5))


def needs_adjusting(spec: SamplingSpec) -> bool:
    """Whether ``adjust`` could change anything for this sequence; only then are tokens read."""
    return bool(
        spec.logit_bias
        or (spec.min_tokens and spec.stop_token_ids)
        or spec.repetition_penalty != 1.0
        or spec.frequency_penalty
        or spec.presence_penalty
    )


class Changes:
    """Single logits to change, of all rows of a step together: what a device takes in one copy."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kinds: tuple[list[torch.Tensor], ...] = tuple([] for _ in _NO_CHANGES)

    def add(self, row: int, spec: SamplingSpec, token_ids: Sequence[int], num_prompt: int) -> None:
        """Note what changes in one row, whose last token comes after ``token_ids``."""
        biases, forbidden, repeated, drawn = self._kinds
        # Each id once for a row, so that writing by index has one outcome.
        if spec.logit_bias:
            biases.append(_fields(row, spec.logit_bias, list(spec.logit_bias.values())))
        if len(token_ids) - num_prompt < spec.min_tokens:
            # A model may name an end token that its vocabulary does not reach.
            known = {token_id for token_id in spec.stop_token_ids if token_id < self._vocab_size}
            forbidden.append(_fields(row, known))
        if spec.repetition_penalty != 1.0:
            repeated.append(_fields(row, set(token_ids), spec.repetition_penalty))
        if (spec.frequency_penalty or spec.presence_penalty) and len(token_ids) > num_prompt:
            found = Counter(token_ids[num_prompt:])
            penalties = spec.frequency_penalty, spec.presence_penalty
            drawn.append(_fields(row, found, list(found.values()), *penalties))

    def tensors(self) -> Sequence[torch.Tensor]:
        """Made on the host, fp64: for each kind of change its fields ``[fields, logits]``."""
        pairs = zip(self._kinds, _NO_CHANGES, strict=True)
        return [torch.cat(parts, dim=1) if parts else none for parts, none in pairs]


def _fields(row: int, ids: Collection[int], *values: float | list[float]) -> torch.Tensor:
    """Row, token id and values, one of each for every id: ``[fields, ids]``."""
    fields = torch.empty(2 + len(values), len(ids), dtype=torch.float64)
    for field, value in zip(fields, (row, list(ids), *values), strict=True):
        field.copy_(torch.tensor(value, dtype=torch.float64))
    return fields


def adjust(logits: torch.Tensor, changes: Sequence[torch.Tensor]) -> None:
    """Change logits [rows, vocab] (fp32) in place, in vLLM's order.

    Bias, minimum length, repetition penalty (over prompt and output, Keskar et al. 2019 as
    transformers has it), frequency and presence penalty (over the output). ``changes``: those of
    ``Changes.tensors``, where the logits are.
    """
    biases, forbidden, repeated, drawn = changes
    if biases.shape[1]:
        place, (bias,) = _read(biases)
        logits[place] += bias
    if forbidden.shape[1]:
        place, _ = _read(forbidden)
        logits[place] = logits.new_full((forbidden.shape[1],), -torch.inf)
    if repeated.shape[1]:
        place, (penalty,) = _read(repeated)
        seen = logits[place]
        logits[place] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if drawn.shape[1]:
        place, (count, frequency, presence) = _read(drawn)
        logits[place] -= frequency * count + presence


def _read(change: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Row and token of each logit, and what else there is, in fp32."""
    row, token_id = change[:2].long()
    return (row, token_id), change[2:].float()
