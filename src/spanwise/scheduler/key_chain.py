"""Names for what full blocks hold."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from hashlib import sha256


def horizon(length: int, recompute_lengths: Sequence[int]) -> int:
    """The length up to which what is computed of a sequence of ``length`` tokens holds.

    Sequences of one horizon have the same rotary tables.
    """
    return min((bound for bound in recompute_lengths if bound >= length), default=sys.maxsize)


class KeyChain:
    """Keys of one sequence's full blocks; equal keys mean equal keys and values in the cache.

    A key is the SHA-256 over the key before it and the block's tokens, so it stands for all tokens
    up to the block's end. The first follows a root made of all else that tells sequences apart:
    the salt, and the horizon. Each block is hashed once; the tokens may grow, but never change.
    """

    def __init__(self, salt: str, horizon: int, block_size: int) -> None:
        self.horizon = horizon
        self._pack = struct.Struct(f"<{block_size}I").pack
        self._block_size = block_size
        # A salt from outside may hold half a surrogate pair.
        named = salt.encode("utf-8", "surrogatepass")
        self._last = sha256(b"%d %d " % (horizon, block_size) + named).digest()
        self._keys: list[bytes] = []

    def keys(self, tokens: Sequence[int], first: int, end: int) -> list[bytes]:
        """Keys of the blocks ``first`` to ``end``, which ``tokens`` fill."""
        size = self._block_size
        for block in range(len(self._keys), end):
            packed = self._pack(*tokens[block * size : (block + 1) * size])
            self._last = sha256(self._last + packed).digest()
            self._keys.append(self._last)
        return self._keys[first:end]
