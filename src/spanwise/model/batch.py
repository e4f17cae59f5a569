"""One step as tensors: what every layer of the shard reads beside hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowSpan:
    """One sequence's part of the flattened tokens.

    Tokens ``offset`` to ``offset + count`` of the step are positions ``start`` to
    ``start + count`` of the sequence. Per cache group, ``read_slots[g]`` are the cache slots of
    positions ``first_read[g]`` to ``start + count``, the oldest any of its queries may see first.
    """

    offset: int
    count: int
    start: int
    first_read: tuple[int, ...]
    read_slots: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class StepBatch:
    """A step's tokens, sequence after sequence, without padding.

    ``token_ids``, ``positions``, ``lengths``: ``[tokens]``; ``lengths`` is the known length of
    each token's own sequence. ``write_slots[g]`` ``[tokens]``: where each token's cache row goes.
    ``group_of[layer]``: the cache group. ``wanted`` ``[n]``: the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    rows: Sequence[RowSpan]
    write_slots: tuple[torch.Tensor, ...]
    group_of: tuple[int, ...]
    wanted: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens the step computes."""
        return self.token_ids.shape[0]
