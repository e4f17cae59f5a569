"""Where tensors of one shape lie in the slots of a group, kept from one call to the next.

Each rank of a group has two slots and uses them in turn. Views of slots depend on shapes only, and
making one costs more than a small copy, so they are made once and kept while they are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import torch

from spanwise.comm.segment import LINE_BYTES
from spanwise.comm.slots import SHAPES_REMEMBERED, Slots

T = TypeVar("T")
Both = tuple[T, T]
"""What is used while the count of meetings is even, and while it is odd."""

Views = list[torch.Tensor]
Sizes = tuple[int, ...]


class Turns:
    """Finds the slots that one rank uses for a collective; None where nothing or too much travels.

    ``equal(dtype, shape)``: a view of each rank's slot. ``uneven(dtype, shape, sizes, dim)``:
    likewise, rank r's with ``sizes[r]`` entries along ``dim``. ``crossed(dtype, shape, sizes)``:
    for each other rank r, the part of the own slot that holds ``sizes[rank][r]`` rows of ``shape``
    for it, and the part of its slot that holds ``sizes[r][rank]`` rows for this one.
    """

    def __init__(self, slots: Slots, rank: int, size: int) -> None:
        kept = lru_cache(SHAPES_REMEMBERED)
        self.equal: Callable[[torch.dtype, torch.Size], Both[Views] | None]
        self.equal = kept(partial(_equal, slots))
        self.uneven: Callable[[torch.dtype, torch.Size, Sizes, int], Both[Views] | None]
        self.uneven = kept(partial(_uneven, slots))
        self.crossed: Callable[
            [torch.dtype, torch.Size, tuple[Sizes, ...]], Both[tuple[Views, Views]] | None
        ]
        self.crossed = kept(partial(_crossed, slots, rank, size))


def part_of(owner: int, other: int) -> int:
    """Which part of the owner's slot is for another rank: the owner itself has none."""
    return other - (other > owner)


def most_rows(sizes: Sequence[Sequence[int]]) -> int:
    """The rows of the largest block that goes from one rank to another."""
    return max(n for r, line in enumerate(sizes) for s, n in enumerate(line) if r != s)


def _equal(slots: Slots, dtype: torch.dtype, shape: torch.Size) -> Both[Views] | None:
    if not 0 < shape.numel() * dtype.itemsize <= slots.slot_bytes:
        return None
    views = slots.views(dtype, shape)
    return views[::2], views[1::2]


def _uneven(
    slots: Slots, dtype: torch.dtype, shape: torch.Size, sizes: Sizes, dim: int
) -> Both[Views] | None:
    shapes = [torch.Size((*shape[:dim], entries, *shape[dim + 1 :])) for entries in sizes]
    if not 0 < max(each.numel() for each in shapes) * dtype.itemsize <= slots.slot_bytes:
        return None

    def views(turn: int) -> Views:
        return [slots.view(2 * rank + turn, dtype, each) for rank, each in enumerate(shapes)]

    return views(0), views(1)


def _crossed(
    slots: Slots,
    rank: int,
    size: int,
    dtype: torch.dtype,
    shape: torch.Size,
    sizes: tuple[Sizes, ...],
) -> Both[tuple[Views, Views]] | None:
    part_bytes = slots.slot_bytes // (size - 1) // LINE_BYTES * LINE_BYTES
    if not 0 < most_rows(sizes) * shape.numel() * dtype.itemsize <= part_bytes:
        return None
    others = [other for other in range(size) if other != rank]

    def block(source: int, target: int, turn: int) -> torch.Tensor:
        rows = torch.Size((sizes[source][target], *shape))
        return slots.view(2 * source + turn, dtype, rows, part_of(source, target) * part_bytes)

    def views(turn: int) -> tuple[Views, Views]:
        gives = [block(rank, other, turn) for other in others]
        return gives, [block(other, rank, turn) for other in others]

    return views(0), views(1)
