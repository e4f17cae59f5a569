"""The communicator of a group of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SingleCommunicator:
    """Every collective of one rank: its own tensor, not copied."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over one rank: ``tensor`` itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """The concatenation of one: ``tensor`` itself."""
        assert list(sizes) == [tensor.shape[dim]], (sizes, tensor.shape, dim)
        return tensor

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """What one rank gives itself: ``tensor`` itself."""
        assert [list(line) for line in sizes] == [[len(tensor)]], (sizes, tensor.shape)
        return tensor

    def barrier(self) -> None:
        """Nobody to wait for."""
