"""Adding up what the ranks gave, always in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROUNDS_EACH_STEP = (torch.bfloat16, torch.float16)


def ordered_sum(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` with the sum of at least two ``parts`` (same shape and dtype), first to last.

    The order makes every rank's bits equal. bfloat16 and float16 are summed in float32 and rounded
    once; one addition of two does just that by itself. ``out`` is none of the parts.
    """
    if len(parts) == 2 or out.dtype not in _ROUNDS_EACH_STEP:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
        return out
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total.add_(part)
    return out.copy_(total)
