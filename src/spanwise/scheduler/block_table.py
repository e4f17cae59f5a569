"""A sequence's block tables, and the arithmetic of how many blocks a sequence holds."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from spanwise.cost.blocks import peak_blocks
from spanwise.scheduler.blocks import BlockPool
from spanwise.types.cache import CacheGroup, CacheLayout

_NEVER_READ = 0  # stands in a windowed table for a block whose positions are out of reach


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
        self._unsent: tuple[int, ...] = ()

    def first_read(self, position: int) -> int:
        """The first block that a query at ``position`` or later reads."""
        if not self.group.window:
            return 0
        return max(0, position - self.group.window + 1) // self.block_size

    def slide(self, start: int) -> None:
        """Let go of the blocks that no position from ``start`` on reads."""
        if not self.group.window:
            return
        num_dead = self.first_read(start)
        while self.held and self.num_blocks - len(self.held) < num_dead:
            self.pool.free((self.held.popleft(),))

    def extend(self, end: int) -> tuple[int, ...]:
        """Append blocks until positions up to ``end`` (exclusive) have a place.

        What was attached is told with the first of them.
        """
        missing = -(-end // self.block_size) - self.num_blocks
        if missing <= 0:
            return ()
        blocks = self.pool.allocate(missing)
        self.held.extend(blocks)
        self.num_blocks += missing
        told, self._unsent = self._unsent + blocks, ()
        return told

    def fit(self, keys: Sequence[bytes], end: int) -> int:
        """The most blocks, up to ``end``, after which all that is read then can be found."""
        find = self.pool.find
        if not self.group.window:
            return next((i for i in range(end) if find(keys[i]) is None), end)
        block, first = end, self.first_read(end * self.block_size)
        while block > first:
            block -= 1
            if find(keys[block]) is None:
                end, first = block, self.first_read(block * self.block_size)
        return end

    def attach(self, keys: Sequence[bytes]) -> None:
        """Begin the table with the blocks found by ``keys``, those that are still read."""
        assert not self.num_blocks and not self.held
        first = self.first_read(len(keys) * self.block_size)
        self.held.extend(self.pool.share(key) for key in keys[first:])
        self.num_blocks = len(keys)
        self._unsent = (_NEVER_READ,) * first + tuple(self.held)

    def register(self, index: int, key: bytes) -> None:
        """Let the block at ``index`` be found by ``key``, if it is still held."""
        place = index - (self.num_blocks - len(self.held))
        if place >= 0:
            self.pool.register(self.held[place], key)

    def needed(self, positions: int, chunk: int, found: Sequence[bytes]) -> int:
        """The most free blocks it takes to compute ``positions`` positions after ``found``."""
        first = self.first_read(len(found) * self.block_size)
        blocks = (self.pool.find(key) for key in found[first:])
        num_idle = sum(block is not None and not self.pool.is_held(block) for block in blocks)
        missing = -(-positions // self.block_size) - len(found)
        peak = peak_blocks(self.group, self.block_size, positions, chunk)
        return min(peak, missing + num_idle, self.pool.num_blocks)

    def release(self) -> None:
        """Let go of everything and begin an empty table.

        The end first: of a prefix that is kept the end is of use only with all before it.
        """
        self.pool.free(reversed(self.held))
        self.held.clear()
        self.num_blocks = 0
        self._unsent = ()


class BlockTable:
    """One sequence's tables, one for each group of a layout, filled from the groups' pools.

    Blocks go back to the pool as soon as a plan no longer needs them, even with steps in flight
    that read them: every rank runs steps in plan order, so whoever gets such a block writes to it
    only after those steps have run. For the same reason a full block can be shared as soon as the
    row that fills it is planned, by rows of the same step too: in each layer all rows of a step
    write before any reads.
    """

    def __init__(self, layout: CacheLayout, pools: tuple[BlockPool, ...]) -> None:
        self._tables = tuple(
            _GroupTable(group, layout.block_size, pool)
            for group, pool in zip(layout.groups, pools, strict=True)
        )
        self._pools = pools
        self._windowed = tuple(table for table in self._tables if table.group.window)
        self._end = 0  # positions before it have a place: tables of all groups are equally long
        self._no_blocks = ((),) * len(pools)
        self.block_size = layout.block_size
        self.num_registered = 0

    @property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Per group, the block ids this sequence holds now."""
        return tuple(tuple(table.held) for table in self._tables)

    def room(self, start: int) -> int:
        """How many positions from ``start`` on fit now; lets go of what left the window before."""
        for table in self._windowed:
            table.slide(start)
        num_free = min([pool.num_free for pool in self._pools])
        return self._end + num_free * self.block_size - start

    def fit(self, start: int, wanted: int) -> int:
        """How many of ``wanted`` positions from ``start`` on fit now; lets go as ``room`` does."""
        if wanted <= self._end - start and not self._windowed:
            return wanted
        return min(wanted, self.room(start))

    def extend(self, end: int) -> tuple[tuple[int, ...], ...]:
        """Make place for positions up to ``end`` (exclusive): per group, the blocks appended."""
        if end <= self._end:
            return self._no_blocks
        appended = tuple([table.extend(end) for table in self._tables])
        self._end = -(-end // self.block_size) * self.block_size
        return appended

    def match(self, keys: Sequence[bytes]) -> int:
        """With how many of the blocks ``keys`` stand for the table can begin.

        Each group must still have the blocks that are read from there on.
        """
        count = len(keys)
        while True:
            fitting = count
            for table in self._tables:
                fitting = table.fit(keys, fitting)
            if fitting == count:
                return count
            count = fitting

    def attach(self, keys: Sequence[bytes]) -> None:
        """Begin with the blocks found by ``keys``, as many as ``match`` said."""
        for table in self._tables:
            table.attach(keys)
        self.num_registered = len(keys)
        self._end = len(keys) * self.block_size

    def register(self, keys: Sequence[bytes]) -> None:
        """Let the next blocks, full by the plans made so far, be found by their keys."""
        for index, key in enumerate(keys, self.num_registered):
            for table in self._tables:
                table.register(index, key)
        self.num_registered += len(keys)

    def needed(self, positions: int, chunk: int, found: Sequence[bytes] = ()) -> tuple[int, ...]:
        """Per group, the most free blocks it takes to compute up to so many positions.

        ``found`` are the keys of blocks to begin with. All blocks there are where a windowed group
        has fewer: chunks then shrink to what fits.
        """
        return tuple(table.needed(positions, chunk, found) for table in self._tables)

    def release(self) -> None:
        """Let go of every block."""
        for table in self._tables:
            table.release()
        self.num_registered = 0
        self._end = 0
