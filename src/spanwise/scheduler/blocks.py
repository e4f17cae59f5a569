"""The blocks of one cache group: which are free, which are taken."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block ids 0 to ``num_blocks - 1``, the one given back last first.

    Last in, first out keeps the touched part of the arena small: ids never reached cost no memory.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._taken = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """How many blocks can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """How many blocks are taken now."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` blocks; the caller has looked that so many are free."""
        assert 0 <= count <= len(self._free), f"{count} of {len(self._free)} free blocks wanted"
        blocks = tuple(self._free.pop() for _ in range(count))
        for block in blocks:
            self._taken[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; each must be taken."""
        for block in blocks:
            assert self._taken[block], f"block {block} was given back twice"
            self._taken[block] = 0
            self._free.append(block)
