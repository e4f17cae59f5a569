"""Which waiting sequences are of no use any more, and when the next one will be."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

_MIN_HEAP = 64


class Deadlines:
    """Sequences by deadline. Those let go stay in the heap until they are half of it."""

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def add(self, sequence_id: int, deadline_s: float) -> None:
        """Watch a sequence."""
        self._due[sequence_id] = deadline_s
        heappush(self._heap, (deadline_s, sequence_id))

    def discard(self, sequence_id: int) -> None:
        """Watch a sequence no more; harmless if it was not watched."""
        if self._due.pop(sequence_id, None) is None:
            return
        if len(self._heap) > max(_MIN_HEAP, 2 * len(self._due)):
            self._heap = [(deadline_s, watched) for watched, deadline_s in self._due.items()]
            heapify(self._heap)

    @property
    def next_s(self) -> float | None:
        """The earliest deadline of all."""
        while self._heap and self._heap[0][1] not in self._due:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now_s: float) -> list[int]:
        """Take out those whose deadline is now or was before, the earliest first."""
        found = []
        while (deadline_s := self.next_s) is not None and deadline_s <= now_s:
            _, sequence_id = heappop(self._heap)
            del self._due[sequence_id]
            found.append(sequence_id)
        return found
