"""A block that a running sequence is about to fill with tokens it has already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class UpcomingBlock:
    """The block at ``index`` of a sequence of ``priority``, to be found by ``key`` when planned."""

    index: int
    key: bytes
    priority: int

    def is_worth_waiting_for(self, keys: Sequence[bytes], num_found: int, priority: int) -> bool:
        """Whether a waiting sequence would compute just this block when admitted now.

        ``keys`` are those of its blocks, ``num_found`` of which can be found. Nobody waits for a
        less urgent one, which may have to wait itself.
        """
        is_wanted = num_found <= self.index < len(keys) and keys[self.index] == self.key
        return is_wanted and self.priority <= priority
