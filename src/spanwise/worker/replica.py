"""The workers of one replica, and the memory that outlives any one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from spanwise.comm.segment import SegmentLayout, create_segment, interrupt
from spanwise.types.worker import ShardInfo, WorkerSpec
from spanwise.worker.process import Process, end


@dataclass(frozen=True)
class ReplicaSpec:
    """The workers of a replica, each one's arena in bytes, and the segment they meet in."""

    workers: tuple[WorkerSpec, ...]
    arena_bytes: tuple[int, ...]
    segment: SegmentLayout

    @property
    def has_own_cards(self) -> bool:
        """Whether there are several ranks, each alone on a card: those are joined by NCCL.

        NCCL refuses two ranks on one card; they, as CPU ranks, are joined by the segment.
        """
        cards = {each.device.index for each in self.workers if each.device.kind == "cuda"}
        return len(cards) == len(self.workers) > 1


class Replica:
    """The running workers, in the order of the spec, with their segment and KV arenas (memfds).

    ``shards``: what each worker holds. ``store``: the process where ranks that use NCCL meet.
    ``forget(replica)`` is called when it has been closed.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        explain: Callable[[Process], str],
        forget: Callable[[Replica], None],
    ) -> None:
        self.spec = spec
        self._explain, self._forget = explain, forget
        self.workers: list[Process] = []
        self.shards: list[ShardInfo] = []
        self.store: Process | None = None
        self.segment_fd = create_segment("spanwise-segment", spec.segment)
        self._fds = [self.segment_fd]

    def new_arena(self, num_bytes: int) -> int:
        """Make the next worker's arena; nothing of it takes memory before it is touched."""
        self._fds.append(os.memfd_create("spanwise-arena", os.MFD_CLOEXEC))
        os.ftruncate(self._fds[-1], num_bytes)
        return self._fds[-1]

    def explain(self, index: int) -> str:
        """How a worker came to its end, as its parent saw it."""
        return self._explain(self.workers[index])

    def close(self, timeout_s: float) -> None:
        """End the workers, also those that wait for one another, and free the memory.

        May be called again.
        """
        if not self._fds:
            return
        interrupt(self.segment_fd)
        end(self.workers, timeout_s)
        for worker in self.workers:
            worker.close()
        if self.store is not None:  # after the ranks, which may be meeting there
            end([self.store], timeout_s)
            self.store.close()
        while self._fds:
            os.close(self._fds.pop())
        self._forget(self)
