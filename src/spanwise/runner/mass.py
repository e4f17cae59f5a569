"""Probability mass in fixed point.

Floating sums depend on their order, and with it on the kernel, the batch and the shard; a running
sum on CUDA even differs between runs. Sums of whole numbers do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

UNIT = 2.0**42
"""The mass of the likeliest token: up to 2**20 tokens add up without overflow, within 3e-8."""

_SLAB = 2**19
_CARD_SLAB = 2**21


def fixed_mass(scores: torch.Tensor) -> torch.Tensor:
    """Give ``exp(scores) * UNIT`` as int64, in the shape of ``scores`` (fp32, at most 0)."""
    return scores.exp().mul_(UNIT).long()


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Give fp32 logits [rows, vocab] as distances from each row's largest, which becomes 0."""
    top = logits.amax(-1, keepdim=True)
    # A row with nothing left in it stays at -inf and does not become NaN.
    return logits - top.clamp(min=torch.finfo(torch.float32).min)


def slabs(num_rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into slabs, which bounds what working copies take.

    Half a million values at once stay near a core; on a card more of them cost fewer launches.
    """
    height = max(1, (_SLAB if device.type == "cpu" else _CARD_SLAB) // vocab)
    return (slice(start, start + height) for start in range(0, num_rows, height))
