"""Which block of one cache group holds the keys and values that a key stands for."""

from __future__ import annotations


class PrefixIndex:
    """Keys and blocks, one to one."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        """Whether the block has a key."""
        return block in self._key_of

    def find(self, key: bytes) -> int | None:
        """The block that holds what the key stands for."""
        return self._block_of.get(key)

    def add(self, key: bytes, block: int) -> None:
        """Give a block its key; neither may be known."""
        assert key not in self._block_of and block not in self._key_of
        self._block_of[key] = block
        self._key_of[block] = key

    def discard(self, block: int) -> None:
        """Forget the block's key: it will be written anew."""
        del self._block_of[self._key_of.pop(block)]

    def clear(self) -> None:
        """Forget everything."""
        self._block_of.clear()
        self._key_of.clear()
