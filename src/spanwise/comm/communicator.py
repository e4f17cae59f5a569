"""The communicator interface every backend has: shared memory, NCCL, single, fake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Communicator(Protocol):
    """Collectives of one group. Every rank of the group calls the same operations in one order.

    A wait can be broken (raises WaitInterruptedError); a failure says rank and operation
    (raises CommunicationError).
    """

    @property
    def rank(self) -> int:
        """This rank's position in the group, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in rank order, so that every rank gets the same bits. In place."""
        ...

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along ``dim``; rank r gives ``sizes[r]`` entries there (0 is allowed)."""
        ...

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Give each rank some rows (entries along dim 0); return what they give to this one.

        Rank r gives ``sizes[r][s]`` rows to rank s (0 is allowed; also to itself). ``tensor`` holds
        this rank's for rank 0, for rank 1 and so on; the result those from rank 0, from rank 1 ...
        """
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...


class Link(Protocol):
    """A one-way channel of tensors between two ranks: first in, first out.

    Both sides know dtype and shape from the step plan; only bytes travel.
    """

    def send(self, tensor: torch.Tensor) -> None:
        """Hand a tensor on; returns once it is copied, waits only while the link is full."""
        ...

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the next tensor and return it."""
        ...


@dataclass(frozen=True)
class RankComm:
    """All channels of one rank.

    ``tp`` spans the ranks of its stage; ``inbox``/``outbox`` join it to the same tensor-parallel
    rank of the stage before and after (None at the ends); ``tokens`` carries sampled ids from the
    last stage to the first (None where a replica has one stage, or the rank is at neither end).
    """

    tp: Communicator
    inbox: Link | None = None
    outbox: Link | None = None
    tokens: Link | None = None
