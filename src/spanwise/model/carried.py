"""What passes from one pipeline stage to the next."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Sizes travel where a program computes with them.
Carried = torch.Tensor | int

_INT_BYTES = 8


def num_bytes(values: Iterable[Carried]) -> int:
    """What ``values`` take on their way; a view as much as it shows."""
    return sum(
        value.numel() * value.element_size() if isinstance(value, torch.Tensor) else _INT_BYTES
        for value in values
    )
