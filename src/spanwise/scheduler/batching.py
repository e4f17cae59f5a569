"""Which waiting sequences may begin: all, or a batch at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from itertools import islice

from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.queue import WaitingQueue


class BatchGate:
    """Closed while a batch runs; opens for the next when it is full or has waited long enough.

    Time is only seen in ``look``, so a sequence has come when ``look`` is called after its
    ``enter``.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._batching = config.batching
        self._size = config.batch_size or config.max_num_seqs
        self._window_s = config.batch_window_s
        self._batch: set[int] = set()
        self._unseen: dict[int, None] = {}
        self._seen_s: OrderedDict[int, float] = OrderedDict()
        self._ran = False
        self._busy_s = 0.0

    @property
    def batch(self) -> Container[int] | None:
        """The sequences that may begin, or have begun; None for any."""
        return None if self._batching == "continuous" else self._batch

    @property
    def opens_at_s(self) -> float | None:
        """When a batch begins that is not full; None where that is not a matter of time."""
        if self._batch or not self._seen_s:
            return None
        oldest_s = next(iter(self._seen_s.values()))
        since_s = self._busy_s if self._batching == "static" else oldest_s
        return since_s + self._window_s

    def enter(self, sequence_id: int) -> None:
        """A sequence has come."""
        if self._batching != "continuous":
            self._unseen[sequence_id] = None

    def leave(self, sequence_id: int) -> None:
        """A sequence has ended, or was taken back."""
        self._batch.discard(sequence_id)
        self._seen_s.pop(sequence_id, None)
        self._unseen.pop(sequence_id, None)

    def look(self, now_s: float, waiting: WaitingQueue) -> None:
        """Begin a batch if it is time."""
        if self._ran or self._unseen:
            self._busy_s = now_s
        self._seen_s.update(dict.fromkeys(self._unseen, now_s))
        self._unseen.clear()
        if not self._batch and self._is_due(now_s):
            self._batch.update(s.sequence_id for s in islice(waiting.fresh(), self._size))
            for sequence_id in self._batch:
                del self._seen_s[sequence_id]
        self._ran = bool(self._batch)

    def _is_due(self, now_s: float) -> bool:
        opens_at_s = self.opens_at_s
        full = len(self._seen_s) >= self._size
        return full or (opens_at_s is not None and opens_at_s <= now_s)
