"""What a rank remembers of the sequences its plans name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spanwise.runner.grammar import AnswerMatcher
from spanwise.runner.pooling import Pool
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import LanePlan, NewSequence, Row

_FIRST_SEATS, _FIRST_WIDTH = 16, 64


@dataclass
class KnownSequence:
    """One sequence: its tokens as far as this rank knows them.

    ``seat``: its row in the block tables. ``matcher`` follows its grammar from the first draw on,
    ``pool`` is what it has pooled so far; both begin anew when the sequence is introduced anew.
    """

    intro: NewSequence
    token_ids: list[int]
    seat: int
    matcher: AnswerMatcher | None = None
    pool: Pool = field(default_factory=Pool)


class BlockTables:
    """The block tables of one cache group, one row a seat, in host memory.

    One tensor for all sequences, so that a step looks up the slots of all its tokens at once.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._in_block = torch.arange(block_size)
        self._blocks = torch.zeros(_FIRST_SEATS, _FIRST_WIDTH, dtype=torch.long)
        self._lengths: list[int] = [0] * _FIRST_SEATS

    def clear(self, seat: int) -> None:
        """Begin a new table at a seat."""
        while seat >= len(self._lengths):
            self._blocks = torch.cat((self._blocks, torch.zeros_like(self._blocks)))
            self._lengths += [0] * len(self._lengths)
        self._lengths[seat] = 0

    def append(self, seat: int, blocks: Sequence[int]) -> None:
        """Lengthen the table at a seat."""
        start = self._lengths[seat]
        end = start + len(blocks)
        while end > self._blocks.shape[1]:
            self._blocks = torch.cat((self._blocks, torch.zeros_like(self._blocks)), dim=1)
        self._blocks[seat, start:end] = torch.tensor(blocks)
        self._lengths[seat] = end

    def slots(self, seats: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The cache slots of positions; both of one shape, or broadcast to one."""
        blocks = self._blocks[seats, positions // self._block_size]
        return blocks.mul_(self._block_size).add_(positions % self._block_size)

    def span(self, seat: int, start: int, end: int) -> torch.Tensor:
        """The cache slots of positions ``start`` to ``end`` (exclusive), ``[n]``."""
        first = start // self._block_size
        blocks = self._blocks[seat, first : -(-end // self._block_size)] * self._block_size
        slots = (blocks[:, None] + self._in_block).flatten()
        return slots[start - first * self._block_size : end - first * self._block_size]


class SequenceTable:
    """All sequences of an epoch, kept in step with the plans, on the host.

    On a card each plan would launch several small copies and kernels for every sequence; what a
    step reads of the table goes there at once with the rest of the step.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.tables = tuple(BlockTables(layout.block_size) for _ in layout.groups)
        self._known: dict[int, KnownSequence] = {}
        self._free_seats: list[int] = []

    def __getitem__(self, sequence_id: int) -> KnownSequence:
        return self._known[sequence_id]

    def update(self, lane: LanePlan) -> None:
        """Apply what a plan changes: sequences dropped, learnt, and blocks appended."""
        for sequence_id in lane.dropped:
            self._leave(sequence_id)
        for intro in lane.new:
            self._learn(intro)
        for row in lane.rows:
            self._append_blocks(row)

    def _learn(self, intro: NewSequence) -> None:
        self._leave(intro.sequence_id)
        seat = self._free_seats.pop() if self._free_seats else len(self._known)
        self._known[intro.sequence_id] = KnownSequence(intro, list(intro.token_ids), seat)
        for table in self.tables:
            table.clear(seat)

    def _leave(self, sequence_id: int) -> None:
        known = self._known.pop(sequence_id, None)
        if known is not None:
            self._free_seats.append(known.seat)

    def _append_blocks(self, row: Row) -> None:
        for table, blocks in zip(self.tables, row.new_blocks, strict=True):
            if blocks:
                table.append(self._known[row.sequence_id].seat, blocks)
