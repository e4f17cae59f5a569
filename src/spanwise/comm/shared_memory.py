"""Collectives through shared memory: the ranks of one host, as processes or as threads.

Each rank copies what it gives into a slot of its own and announces it; when all have, each reads
all slots. Slots alternate between two, so one meeting a call is enough: a rank that writes a slot
again has met the others once since they read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from spanwise.comm.communicator import Communicator, Link, RankComm
from spanwise.comm.counters import DEFAULT_SPIN_S, DEFAULT_TIMEOUT_S, Counters
from spanwise.comm.ordered_sum import ordered_sum
from spanwise.comm.ring import RingLink
from spanwise.comm.segment import Channel, Segment
from spanwise.comm.single import SingleCommunicator
from spanwise.comm.slots import Slots
from spanwise.comm.staging import to_host
from spanwise.comm.turns import Turns, most_rows, part_of


class SharedMemoryCommunicator:
    """The collectives of one group. A card's tensors are staged through page-locked memory.

    What fits the slots takes a copy into the own one, a meeting, and one operation that reads the
    others: all else that depends on shapes only is kept from the last time. The rest goes in
    pieces.
    """

    def __init__(self, counters: Counters, slots: Slots, rank: int, size: int) -> None:
        self._counters = counters
        self._slots = slots
        self._rank = rank
        self._size = size
        self._others = [other for other in range(size) if other != rank]
        self._count = 0
        self._turns = Turns(slots, rank, size)

    @property
    def rank(self) -> int:
        """This rank's position in the group, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in rank order, in place; float16 and bfloat16 are rounded once."""
        turns = self._turns.equal(tensor.dtype, tensor.shape) if tensor.is_cpu else None
        if turns is None:
            return self._all_reduce_in_pieces(tensor)
        views = turns[self._count % 2]
        views[self._rank].copy_(tensor)
        self._meet("all_reduce")
        if self._size == 2:  # a sum of two is the same from either side
            return tensor.add_(views[1 - self._rank])
        return ordered_sum(views, out=tensor)

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along ``dim``; rank r gives ``sizes[r]`` entries there (0 is allowed)."""
        shape = tensor.shape
        dim %= len(shape)
        assert len(sizes) == self._size and shape[dim] == sizes[self._rank], (sizes, dim)
        if not tensor.is_cpu:
            return self.all_gather(to_host(tensor), sizes, dim).to(tensor.device)
        turns = self._turns.uneven(tensor.dtype, shape, tuple(sizes), dim)
        if turns is None:
            return self._all_gather_in_tiles(tensor, sizes, dim)
        views = turns[self._count % 2]
        views[self._rank].copy_(tensor)
        self._meet("all_gather")
        return torch.cat(views, dim)

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Give rank s its ``sizes[rank][s]`` rows; return what the ranks give to this one."""
        assert [len(line) for line in sizes] == [self._size] * self._size, sizes
        rank, rows = self._rank, sizes[self._rank]
        assert len(tensor) == sum(rows), (tensor.shape, rows)
        if not tensor.is_cpu:
            return self.all_to_all(to_host(tensor), sizes).to(tensor.device)
        turns = self._turns.crossed(tensor.dtype, tensor.shape[1:], tuple(map(tuple, sizes)))
        if turns is None:
            return self._all_to_all_in_pieces(tensor, sizes)
        gives, takes = turns[self._count % 2]
        blocks = list(torch.split(tensor, list(rows)))
        own = blocks.pop(rank)
        for view, block in zip(gives, blocks, strict=True):
            view.copy_(block)
        self._meet("all_to_all")
        return torch.cat([*takes[:rank], own, *takes[rank:]])

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._meet("barrier")

    def _all_reduce_in_pieces(self, tensor: torch.Tensor) -> torch.Tensor:
        large = tensor.nbytes > self._slots.slot_bytes
        if not tensor.is_cpu or (large and not tensor.is_contiguous()):
            return tensor.copy_(self.all_reduce(to_host(tensor)), non_blocking=True)
        for piece in self._slots.pieces(tensor):
            self.all_reduce(piece)
        return tensor

    def _all_gather_in_tiles(
        self, tensor: torch.Tensor, sizes: Sequence[int], dim: int
    ) -> torch.Tensor:
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        out = tensor.new_empty((*before, sum(sizes), *after))
        if out.numel():
            rows, columns = math.prod(before), [size * math.prod(after) for size in sizes]
            bands = torch.split(out.view(rows, sum(columns)), columns, dim=1)
            self._gather(tensor.reshape(rows, columns[self._rank]), bands)
        return out

    def _gather(self, own: torch.Tensor, bands: Sequence[torch.Tensor]) -> None:
        """Fill ``bands[r]`` (``[rows, columns of r]``) with what rank r gives; ``own`` is ours."""
        capacity = self._slots.slot_bytes // own.itemsize
        for tile in tiles(own.shape[0], max(band.shape[1] for band in bands), capacity):
            parity = self._count % 2
            self._copy(tile.of(own), self._rank, parity, into_slot=True)
            self._meet("all_gather")
            for member, band in enumerate(bands):
                self._copy(tile.of(band), member, parity, into_slot=False)

    def _copy(self, part: torch.Tensor, member: int, parity: int, *, into_slot: bool) -> None:
        if part.numel():
            slot = self._slots.views(part.dtype, part.shape)[2 * member + parity]
            (slot if into_slot else part).copy_(part if into_slot else slot)

    def _all_to_all_in_pieces(
        self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        rank, width = self._rank, math.prod(tensor.shape[1:])
        taken = [line[rank] for line in sizes]
        out = tensor.new_empty((sum(taken), *tensor.shape[1:]))
        gives = torch.split(tensor.reshape(-1), [count * width for count in sizes[rank]])
        takes = torch.split(out.view(-1), [count * width for count in taken])
        takes[rank].copy_(gives[rank])
        part = self._slots.slot_bytes // tensor.itemsize // (self._size - 1)
        assert part > 0, f"slots of {self._slots.slot_bytes} bytes for {self._size} ranks"
        slots = self._slots.views(tensor.dtype, torch.Size((self._size - 1, part)))
        for start in range(0, most_rows(sizes) * width, part):
            views = slots[self._count % 2 :: 2]
            for other in self._others:
                block = gives[other][start : start + part]
                views[rank][part_of(rank, other), : len(block)].copy_(block)
            self._meet("all_to_all")
            for other in self._others:
                block = takes[other][start : start + part]
                block.copy_(views[other][part_of(other, rank), : len(block)])
        return out

    def _meet(self, operation: str) -> None:
        self._count = count = self._count + 1
        counters = self._counters
        counters.publish(count)
        for other in self._others:
            counters.wait_for(other, count, operation)


class Tile(NamedTuple):
    """A rectangle of a matrix: rows and columns from (inclusive) to (exclusive)."""

    first_row: int
    end_row: int
    first_column: int
    end_column: int

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The part of a matrix that lies in the tile; empty where it is narrower."""
        return matrix[self.first_row : self.end_row, self.first_column : self.end_column]


def tiles(num_rows: int, num_columns: int, capacity: int) -> Iterator[Tile]:
    """Cut a matrix into tiles of at most ``capacity`` entries: whole rows where one fits."""
    rows, columns = max(1, capacity // num_columns), min(num_columns, capacity)
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            end_row, end_column = min(row + rows, num_rows), min(column + columns, num_columns)
            yield Tile(row, end_row, column, end_column)


def open_rank_comm(
    fd: int,
    pp_rank: int,
    tp_rank: int,
    *,
    spin_s: float = DEFAULT_SPIN_S,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> RankComm:
    """Map the segment made by ``create_segment`` and return this rank's channels.

    The descriptor may be closed afterwards. Each rank opens a segment once; a rank may be a
    process or a thread. ``spin_s``: how long a wait looks before it sleeps, as long as that pays;
    give 0 where ranks are threads of one process or outnumber cores. A wait longer than
    ``timeout_s`` raises CommunicationError. Nothing needs closing: the mapping goes with the last
    channel.
    """
    place = _Place(Segment(fd), pp_rank, tp_rank, spin_s, timeout_s)
    layout = place.segment.layout
    assert pp_rank < layout.pp_size and tp_rank < layout.tp_size, (pp_rank, tp_rank, layout)
    last = layout.pp_size - 1
    first_or_last = last > 0 and pp_rank in (0, last)
    return RankComm(
        tp=place.group(),
        inbox=place.link(layout.link(pp_rank - 1, tp_rank), pp_rank - 1, pp_rank)
        if pp_rank > 0
        else None,
        outbox=place.link(layout.link(pp_rank, tp_rank), pp_rank, pp_rank + 1)
        if pp_rank < last
        else None,
        tokens=place.link(layout.tokens(tp_rank), last, 0) if first_or_last else None,
    )


class _Place(NamedTuple):
    """One rank's view of a segment, from which its channels are made."""

    segment: Segment
    pp_rank: int
    tp_rank: int
    spin_s: float
    timeout_s: float

    def group(self) -> Communicator:
        size = self.segment.layout.tp_size
        if size == 1:
            return SingleCommunicator()
        channel = self.segment.layout.group(self.pp_rank)
        names = [_name(self.pp_rank, rank) for rank in range(size)]
        counters = self._counters(channel, self.tp_rank, names)
        return SharedMemoryCommunicator(counters, Slots(self.segment, channel), self.tp_rank, size)

    def link(self, channel: Channel, sender: int, receiver: int) -> Link:
        names = [_name(stage, self.tp_rank) for stage in (sender, receiver)]
        counters = self._counters(channel, int(self.pp_rank == receiver), names)
        return RingLink(counters, Slots(self.segment, channel), channel.num_slots)

    def _counters(self, channel: Channel, member: int, names: Sequence[str]) -> Counters:
        limits = {"spin_s": self.spin_s, "timeout_s": self.timeout_s}
        return Counters(self.segment, channel, member, names, **limits)


def _name(stage: int, tp_rank: int) -> str:
    return f"stage {stage} tp rank {tp_rank}"
