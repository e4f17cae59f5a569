"""Which prompt blocks a replica has been given lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile


class PrefixMemory:
    """At most ``max_blocks`` block keys, those of the prefix seen longest ago forgotten first.

    A key stands for its block and all before it. Of one prefix the deepest blocks are forgotten
    first, as a replica's cache evicts them: without its beginning the rest is of no use.
    """

    def __init__(self, max_blocks: int) -> None:
        assert max_blocks >= 0
        self._max_blocks = max_blocks
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, prefix: Sequence[bytes]) -> int:
        """How many leading blocks of the prefix are remembered."""
        return sum(1 for _ in takewhile(self._keys.__contains__, prefix))

    def remember(self, prefix: Sequence[bytes]) -> None:
        """Take in a prefix that the replica is given now."""
        for key in reversed(prefix[: self._max_blocks]):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_blocks:
            self._keys.popitem(last=False)

    def forget(self) -> None:
        """Forget all: the replica's cache is gone."""
        self._keys.clear()
