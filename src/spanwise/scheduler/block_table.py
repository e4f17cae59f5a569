"""A sequence's block tables, and the arithmetic of how many blocks a sequence holds."""

from __future__ import annotations

import sys
from collections import deque

from spanwise.cost.blocks import peak_blocks
from spanwise.scheduler.blocks import BlockPool
from spanwise.types.cache import CacheGroup, CacheLayout


def max_positions(layout: CacheLayout) -> int:
    """How many positions of one sequence the cache holds when it runs alone.

    A windowed group with blocks for a window and one token more has no bound.
    """
    size = layout.block_size
    bounds = [
        group.num_blocks * size
        for group in layout.groups
        if peak_blocks(group, size, sys.maxsize, 1) > group.num_blocks
    ]
    return min(bounds, default=sys.maxsize)


class _GroupTable:
    """The table of one group: ``num_blocks`` entries so far, of which the last are still held."""

    def __init__(self, group: CacheGroup, block_size: int, pool: BlockPool) -> None:
        self.group = group
        self.pool = pool
        self.block_size = block_size
        self.num_blocks = 0
        self.held: deque[int] = deque()

    def slide(self, start: int) -> None:
        """Free the blocks that no position from ``start`` on reads."""
        if not self.group.window:
            return
        num_dead = (start - self.group.window + 1) // self.block_size
        while self.held and self.num_blocks - len(self.held) < num_dead:
            self.pool.free((self.held.popleft(),))

    def extend(self, end: int) -> tuple[int, ...]:
        """Append blocks until positions up to ``end`` (exclusive) have a place."""
        missing = -(-end // self.block_size) - self.num_blocks
        blocks = self.pool.allocate(max(0, missing))
        self.held.extend(blocks)
        self.num_blocks += len(blocks)
        return blocks

    def release(self) -> None:
        """Give everything back and begin an empty table."""
        self.pool.free(self.held)
        self.held.clear()
        self.num_blocks = 0


class BlockTable:
    """One sequence's tables, one for each group of a layout, filled from the groups' pools.

    Blocks go back to the pool as soon as a plan no longer needs them, even with steps in flight
    that read them: every rank runs steps in plan order, so whoever gets such a block writes to it
    only after those steps have run.
    """

    def __init__(self, layout: CacheLayout, pools: tuple[BlockPool, ...]) -> None:
        self._tables = tuple(
            _GroupTable(group, layout.block_size, pool)
            for group, pool in zip(layout.groups, pools, strict=True)
        )

    @property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Per group, the block ids this sequence owns now."""
        return tuple(tuple(table.held) for table in self._tables)

    def room(self, start: int) -> int:
        """How many positions from ``start`` on fit now; frees what left the window before."""
        for table in self._tables:
            table.slide(start)
        ends = ((t.num_blocks + t.pool.num_free) * t.block_size for t in self._tables)
        return min(ends) - start

    def extend(self, end: int) -> tuple[tuple[int, ...], ...]:
        """Make place for positions up to ``end`` (exclusive): per group, the blocks appended."""
        return tuple(table.extend(end) for table in self._tables)

    def needed(self, positions: int, chunk: int) -> tuple[int, ...]:
        """Per group, the most blocks held at once to compute so many positions from 0.

        All there are where a windowed group has fewer: chunks then shrink to what fits.
        """
        return tuple(
            min(peak_blocks(t.group, t.block_size, positions, chunk), t.pool.num_blocks)
            for t in self._tables
        )

    def release(self) -> None:
        """Give every block back."""
        for table in self._tables:
            table.release()
