"""What a rank remembers of the sequences its plans name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spanwise.types.cache import CacheLayout
from spanwise.types.plan import LanePlan, NewSequence, Row


@dataclass
class KnownSequence:
    """One sequence: its tokens as far as this rank knows them, and its slots in each cache group.

    ``slots[g]`` ``[n]``: the cache slot of each position the block table covers.
    """

    intro: NewSequence
    token_ids: list[int]
    slots: list[torch.Tensor]


class SequenceTable:
    """All sequences of an epoch, kept in step with the plans."""

    def __init__(self, layout: CacheLayout, device: torch.device) -> None:
        self._block_size = layout.block_size
        self._num_groups = len(layout.groups)
        self._device = device
        self._in_block = torch.arange(layout.block_size, device=device)
        self._known: dict[int, KnownSequence] = {}

    def __getitem__(self, sequence_id: int) -> KnownSequence:
        return self._known[sequence_id]

    def update(self, lane: LanePlan) -> None:
        """Apply what a plan changes: sequences dropped, learnt, and blocks appended."""
        for sequence_id in lane.dropped:
            self._known.pop(sequence_id, None)
        for intro in lane.new:
            empty = torch.empty(0, dtype=torch.long, device=self._device)
            self._known[intro.sequence_id] = KnownSequence(
                intro, list(intro.token_ids), [empty] * self._num_groups
            )
        for row in lane.rows:
            self._append_blocks(row)

    def _append_blocks(self, row: Row) -> None:
        slots = self._known[row.sequence_id].slots
        for group, blocks in enumerate(row.new_blocks):
            if blocks:
                first = torch.tensor(blocks, device=self._device) * self._block_size
                more = (first[:, None] + self._in_block).flatten()
                slots[group] = torch.cat((slots[group], more))
