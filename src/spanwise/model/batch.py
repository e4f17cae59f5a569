"""One step as tensors: what every layer of the shard reads beside hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowSpan:
    """One sequence's part of the flattened tokens.

    Tokens ``offset`` to ``offset + count`` of the step are positions ``start`` to
    ``start + count`` of the sequence. In cache group g it reads positions ``first_read[g]``, the
    oldest any of its queries may see, to ``start + count``.
    """

    offset: int
    count: int
    start: int
    first_read: tuple[int, ...]


@dataclass(frozen=True)
class CacheReads:
    """What a step's rows read of one cache group.

    ``slots`` ``[n]``: row after row. ``gathers``: how many slots each row reads, in parts that are
    copied out of the cache together: one copy for each row would cost short rows more than their
    attention, one for all would take memory for every running sequence at once.
    """

    slots: torch.Tensor
    gathers: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[int]:
        """How many slots each row reads."""
        return [count for gather in self.gathers for count in gather]


@dataclass(frozen=True)
class StepBatch:
    """A step's tokens, sequence after sequence, without padding.

    ``token_ids``, ``positions``, ``lengths``: ``[tokens]``; ``lengths`` is the known length of
    each token's own sequence. ``write_slots[g]`` ``[tokens]``: where each token's cache row goes;
    ``reads[g]``: what its rows read. ``group_of[layer]``: the cache group. ``wanted`` ``[n]``: the
    tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    rows: Sequence[RowSpan]
    write_slots: tuple[torch.Tensor, ...]
    reads: tuple[CacheReads, ...]
    group_of: tuple[int, ...]
    wanted: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens the step computes."""
        return self.token_ids.shape[0]
