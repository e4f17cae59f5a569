"""The shared memory of one replica in one epoch: where everything lies, and who makes it.

Imports no torch, so that a supervisor can make, hand out and interrupt segments.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass
from functools import cached_property

from spanwise.comm import futex

LINE_BYTES = 64
"""A cache line: words of different writers never share one."""

_PAGE_BYTES = 4096
_HEADER = struct.Struct("<8s6Q")
_MAGIC = b"spanwise"
_INTERRUPTED_AT = LINE_BYTES * 2
_MAX_MEMBERS = 254  # a member's number plus one must fit the byte a sleeper leaves


@dataclass(frozen=True)
class Channel:
    """Where one group or one link lies in the segment; offsets in bytes.

    A counter for each member, each on its own line, from ``counters_at``; a byte for each member,
    set while it sleeps, from ``parked_at``; ``num_slots`` slots of ``slot_bytes`` from
    ``slots_at``.
    """

    num_members: int
    counters_at: int
    parked_at: int
    slots_at: int
    num_slots: int
    slot_bytes: int

    def counter_at(self, member: int) -> int:
        """Offset of a member's counter."""
        return self.counters_at + member * LINE_BYTES


@dataclass(frozen=True)
class SegmentLayout:
    """The shape of a segment, and from it every offset.

    ``slot_bytes``: what a rank gives to a collective at a time (larger tensors go in pieces).
    ``link_slot_bytes``, ``num_link_slots``: the rings between stages; a sender never waits while at
    most ``num_link_slots`` steps are in flight and a step's tensor fits one slot.
    ``token_slot_bytes``: a slot of the rings from the last stage to the first, as many. Slots are
    multiples of 64 bytes. Memory is taken from the system only where it is touched.
    """

    pp_size: int
    tp_size: int
    slot_bytes: int = 1 << 20
    link_slot_bytes: int = 1 << 20
    num_link_slots: int = 8
    token_slot_bytes: int = 1 << 13

    def __post_init__(self) -> None:
        assert self.pp_size >= 1 and 1 <= self.tp_size <= _MAX_MEMBERS
        assert self.num_link_slots >= 1
        for size in (self.slot_bytes, self.link_slot_bytes, self.token_slot_bytes):
            assert size >= LINE_BYTES and size % LINE_BYTES == 0, size

    def group(self, stage: int) -> Channel:
        """The tensor-parallel group of a stage: two slots for each member."""
        return self.channels[stage]

    def link(self, stage: int, tp_rank: int) -> Channel:
        """The ring from ``stage`` to the next one; member 0 sends, member 1 receives."""
        return self.channels[self.pp_size + stage * self.tp_size + tp_rank]

    def tokens(self, tp_rank: int) -> Channel:
        """The ring from the last stage to the first."""
        return self.link(self.pp_size - 1, tp_rank)

    @property
    def total_bytes(self) -> int:
        """Size of the whole segment: what it takes once every page of it was touched."""
        last = self.channels[-1]
        return max(last.slots_at + last.num_slots * last.slot_bytes, _PAGE_BYTES)

    @cached_property
    def channels(self) -> tuple[Channel, ...]:
        """Every channel: the groups by stage, the links by stage and rank, the token rings."""
        shapes = self._shapes()
        flags = [LINE_BYTES * (members + _lines(members)) for members, _, _ in shapes]
        flags_at, slots_at = _PAGE_BYTES, _round_up(_PAGE_BYTES + sum(flags), _PAGE_BYTES)
        channels = []
        for (members, num_slots, slot_bytes), flag_bytes in zip(shapes, flags, strict=True):
            parked_at = flags_at + members * LINE_BYTES
            channels.append(Channel(members, flags_at, parked_at, slots_at, num_slots, slot_bytes))
            flags_at += flag_bytes
            slots_at += num_slots * slot_bytes
        return tuple(channels)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Members, slots and bytes a slot of every channel, in order."""
        group = (self.tp_size, 2 * self.tp_size if self.tp_size > 1 else 0, self.slot_bytes)
        link = (2, self.num_link_slots, self.link_slot_bytes)
        tokens = (2, self.num_link_slots, self.token_slot_bytes)
        shapes = [group] * self.pp_size + [link] * ((self.pp_size - 1) * self.tp_size)
        return shapes + [tokens] * (self.tp_size if self.pp_size > 1 else 0)


class Segment:
    """A segment mapped into this process. Stays mapped while anything made from it lives."""

    def __init__(self, fd: int) -> None:
        self.memory = mmap.mmap(fd, 0)
        self.words = memoryview(self.memory).cast("Q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        magic, *sizes = _HEADER.unpack_from(self.memory)
        assert magic == _MAGIC, "not a segment made by create_segment"
        self.layout = SegmentLayout(*sizes)

    @property
    def interrupted(self) -> bool:
        """Whether the waits of this segment are to end."""
        return self.words[_INTERRUPTED_AT // 8] != 0

    def interrupt(self) -> None:
        """End every wait of every rank, now and from now on."""
        self.words[_INTERRUPTED_AT // 8] = 1
        futex.Fence()()
        for channel in self.layout.channels:
            for member in range(channel.num_members):
                futex.wake(self.address + channel.counter_at(member))


def create_segment(name: str, layout: SegmentLayout) -> int:
    """Make an empty segment and return its descriptor; it is gone with the last one who maps it.

    ``name`` shows in /proc only; nothing appears in a file system. The descriptor closes on exec;
    hand it on by forking, over a Unix socket or through ``pass_fds``.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, layout.total_bytes)
    sizes = (layout.slot_bytes, layout.link_slot_bytes, layout.num_link_slots)
    header = (layout.pp_size, layout.tp_size, *sizes, layout.token_slot_bytes)
    os.pwrite(fd, _HEADER.pack(_MAGIC, *header), 0)
    return fd


def interrupt(fd: int) -> None:
    """Break the waits of all ranks on the segment: each raises WaitInterruptedError within 0.1 s.

    Final for this segment: the next epoch gets a new one.
    """
    Segment(fd).interrupt()


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
