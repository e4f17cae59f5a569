"""The blocks of one cache group: which are free, which are held, and which still hold a prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from spanwise.scheduler.prefix_index import PrefixIndex


class BlockPool:
    """Hands out block ids 0 to ``num_blocks - 1``, and keeps what freed blocks hold while it can.

    A block has as many holders as sequences read it. Without one it is free; if it has a key it
    can still be found and shared. Blocks without a key are taken first, the one given back last
    before others, which keeps the touched part of the arena small: ids never reached cost no
    memory. Then come those with a key, the one freed longest ago first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._blank = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        """How many blocks can be allocated now."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        """How many blocks are held now."""
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` blocks; the caller has looked that so many are free."""
        assert 0 <= count <= self.num_free, f"{count} of {self.num_free} free blocks wanted"
        return tuple(self._take() for _ in range(count))

    def free(self, blocks: Iterable[int]) -> None:
        """Let go of blocks; each must be held. Those named first are taken anew first."""
        for block in blocks:
            assert self._holders[block], f"block {block} was given back twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._put_back(block)

    def register(self, block: int, key: bytes) -> None:
        """Let a held block be found by its key, unless another that is held can be already."""
        assert self._holders[block], f"block {block} is held by nobody"
        other = self._index.find(key)
        if other is not None:
            if self._holders[other]:
                return
            del self._kept[other]
            self._index.discard(other)
            self._blank.append(other)
        self._index.add(key, block)

    def find(self, key: bytes) -> int | None:
        """The block that can be found by ``key``."""
        return self._index.find(key)

    def is_held(self, block: int) -> bool:
        """Whether a sequence holds the block."""
        return self._holders[block] > 0

    def share(self, key: bytes) -> int:
        """Become one more holder of the block found by ``key``."""
        block = self._index.find(key)
        assert block is not None, "a prefix is gone that was just found"
        if not self._holders[block]:
            del self._kept[block]
        self._holders[block] += 1
        return block

    def forget(self) -> None:
        """Forget all keys: what the blocks held is lost."""
        self._index.clear()
        self._blank.extend(reversed(self._kept))
        self._kept.clear()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._index.discard(block)
        self._holders[block] = 1
        return block

    def _put_back(self, block: int) -> None:
        if block in self._index:
            self._kept[block] = None
        else:
            self._blank.append(block)
