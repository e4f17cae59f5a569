"""A link through shared memory: a ring of slots with one sender and one receiver."""

from __future__ import annotations

import torch

from spanwise.comm.counters import Counters
from spanwise.comm.slots import Slots
from spanwise.comm.staging import host_like, to_host

_SENDER, _RECEIVER = 0, 1


class RingLink:
    """One end of a ring. A tensor larger than a slot travels in pieces, an empty one not at all.

    A card's tensor is staged through page-locked memory.
    """

    def __init__(self, counters: Counters, slots: Slots, num_slots: int) -> None:
        self._counters = counters
        self._slots = slots
        self._num_slots = num_slots
        self._count = 0

    def send(self, tensor: torch.Tensor) -> None:
        """Copy a tensor into the ring; waits only while the ring is full."""
        if not tensor.is_cpu:
            tensor = to_host(tensor)
        if tensor.nbytes > self._slots.slot_bytes:
            tensor = tensor.contiguous()
        for piece in self._slots.pieces(tensor):
            views = self._slots.views(piece.dtype, piece.shape)
            self._counters.wait_for(_RECEIVER, self._count + 1 - self._num_slots, "send")
            views[self._count % self._num_slots].copy_(piece)
            self._count += 1
            self._counters.publish(self._count)

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the next tensor and return it."""
        if not out.is_cpu:
            return out.copy_(self.recv(host_like(out)), non_blocking=True)
        if out.nbytes > self._slots.slot_bytes and not out.is_contiguous():
            return out.copy_(self.recv(torch.empty(out.shape, dtype=out.dtype)))
        for piece in self._slots.pieces(out):
            views = self._slots.views(piece.dtype, piece.shape)
            self._counters.wait_for(_SENDER, self._count + 1, "recv")
            piece.copy_(views[self._count % self._num_slots])
            self._count += 1
            self._counters.publish(self._count)
        return out
