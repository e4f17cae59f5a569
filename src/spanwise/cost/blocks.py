"""How many cache blocks a sequence holds."""

from __future__ import annotations

from spanwise.types.cache import CacheGroup


def peak_blocks(group: CacheGroup, block_size: int, positions: int, chunk: int) -> int:
    """Most blocks of ``group`` held at once while ``positions`` are computed, ``chunk`` a row.

    A row of a windowed group reads ``window - 1`` positions before it and writes its own; that
    many positions in a row touch one block more than they fill when they lie across a border.
    """
    whole = -(-positions // block_size)
    if not group.window:
        return whole
    span = group.window - 1 + min(chunk, positions)
    return min(whole, (span + block_size - 2) // block_size + 1)
