"""One step as tensors: what every layer of the shard reads beside hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from spanwise.device.attention import mask_of


@dataclass(frozen=True)
class ChunkRead:
    """What one row reads of a cache group.

    Tokens ``offset`` to ``offset + count`` of the step are positions ``start`` to
    ``start + count`` of the sequence. ``slots`` ``[n]`` hold positions ``first_key``, the oldest
    that any of its queries may see, to ``start + count``.
    """

    offset: int
    count: int
    start: int
    first_key: int
    slots: torch.Tensor


@dataclass(frozen=True)
class DecodeRead:
    """What rows of one token each read of a cache group, filled up to one length.

    ``tokens`` ``[rows]``: which tokens of the step; None: all, in order. ``slots``
    ``[rows * length]``: row after row, with slots of the row itself for filling. ``counts``
    ``[rows]``: how many of a row's places count.
    """

    tokens: torch.Tensor | None
    slots: torch.Tensor
    counts: torch.Tensor

    @property
    def num_rows(self) -> int:
        """How many rows read."""
        return self.counts.shape[0]

    @cached_property
    def _masks(self) -> dict[torch.dtype, torch.Tensor]:
        return {}

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to scores ``[rows, length]``; the same for all layers."""
        if dtype not in self._masks:
            length = self.slots.shape[0] // self.num_rows
            self._masks[dtype] = mask_of(self.counts, length, dtype)
        return self._masks[dtype]


@dataclass(frozen=True)
class CacheReads:
    """What a step's rows read of one cache group; every row is in one of the two."""

    chunks: tuple[ChunkRead, ...]
    decodes: tuple[DecodeRead, ...] = ()


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
    write_slots: tuple[torch.Tensor, ...]
    reads: tuple[CacheReads, ...]
    group_of: tuple[int, ...]
    wanted: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens the step computes."""
        return self.token_ids.shape[0]
