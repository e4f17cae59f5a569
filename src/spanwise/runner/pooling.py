"""The mean of a sequence's hidden states, gathered over as many steps as its prompt takes."""

from __future__ import annotations

import torch


class Pool:
    """A running sum in fp32, of the positions that count; that may be the last one alone."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, hidden: torch.Tensor) -> None:
        """Take in the hidden states [positions, hidden] of the next positions."""
        part = hidden.float().sum(0)
        self._sum = part if self._sum is None else self._sum + part
        self._count += len(hidden)

    def mean(self, count: int) -> tuple[float, ...]:
        """The mean of all that were taken in; ``count`` is how many that must be."""
        assert self._sum is not None and self._count == count, (
            f"{self._count} positions were computed where {count} are pooled"
        )
        return tuple((self._sum / count).tolist())
