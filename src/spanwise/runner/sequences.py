"""What a rank remembers of the sequences its plans name."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from spanwise.runner.grammar import AnswerMatcher
from spanwise.runner.pooling import Pool
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import LanePlan, NewSequence, Row


@dataclass
class KnownSequence:
    """One sequence: its tokens as far as this rank knows them, and its slots in each cache group.

    ``slots[g]`` ``[n]``: the cache slot of each position the block table covers, in host memory.
    ``matcher`` follows its grammar from the first draw on, ``pool`` is what it has pooled so far;
    both begin anew when the sequence is introduced anew.
    """

    intro: NewSequence
    token_ids: list[int]
    slots: list[torch.Tensor]
    matcher: AnswerMatcher | None = None
    pool: Pool = field(default_factory=Pool)


class SequenceTable:
    """All sequences of an epoch, kept in step with the plans, on the host.

    On a card each plan would launch several small copies and kernels for every sequence; what a
    step reads of the table goes there at once with the rest of the step.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._block_size = layout.block_size
        self._num_groups = len(layout.groups)
        self._in_block = torch.arange(layout.block_size)
        self._known: dict[int, KnownSequence] = {}

    def __getitem__(self, sequence_id: int) -> KnownSequence:
        return self._known[sequence_id]

    def update(self, lane: LanePlan) -> None:
        """Apply what a plan changes: sequences dropped, learnt, and blocks appended."""
        for sequence_id in lane.dropped:
            self._known.pop(sequence_id, None)
        for intro in lane.new:
            empty = torch.empty(0, dtype=torch.long)
            self._known[intro.sequence_id] = KnownSequence(
                intro, list(intro.token_ids), [empty] * self._num_groups
            )
        for row in lane.rows:
            self._append_blocks(row)

    def _append_blocks(self, row: Row) -> None:
        slots = self._known[row.sequence_id].slots
        for group, blocks in enumerate(row.new_blocks):
            if blocks:
                first = torch.tensor(blocks) * self._block_size
                more = (first[:, None] + self._in_block).flatten()
                slots[group] = torch.cat((slots[group], more))
