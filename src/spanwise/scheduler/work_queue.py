"""Which piece of work a free device takes next: the policy of ``Queue``. Pure: no clock."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count
from math import inf

import msgspec

from spanwise.scheduler.deadlines import Deadlines

_Entry = tuple[int, float, int, int]  # priority, deadline, age, id


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work. ``work_id`` is never used twice.

    ``priority``: the smaller, the sooner. ``deadline_s``: of no use unless begun by then.
    ``devices``: those that may do it. ``num_retries``: how often it is tried again, on another
    device where there is one.
    """

    work_id: int
    devices: frozenset[str]
    priority: int = 0
    deadline_s: float | None = None
    num_retries: int = 0


class WorkQueue:
    """Work waits in one line, and devices take from it whenever they are free.

    So a slow device gets less, and none is idle while there is work that it may do. Of the waiting
    the smallest priority is first, then the earliest deadline, then the eldest. What failed comes
    before others of its kind again, and not on a device where it failed, as long as another may do
    it. Times are on any clock that never goes back.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._lines: dict[frozenset[str], list[_Entry]] = {}
        self._deadlines = Deadlines()
        self._waiting: dict[int, Work] = {}
        self._running: dict[int, tuple[Work, str]] = {}
        self._failed_on: dict[int, set[str]] = {}
        self._age: dict[int, int] = {}
        self._ages = count()
        self._devices = frozenset(devices)

    def __len__(self) -> int:
        """How much waits or runs."""
        return len(self._waiting) + len(self._running)

    @property
    def num_waiting(self) -> int:
        """How much waits."""
        return len(self._waiting)

    def add(self, work: Work) -> None:
        """Let work wait."""
        assert work.work_id not in self._age, "a work id was used twice"
        assert work.devices and work.devices <= self._devices, "no device may do it"
        self._age[work.work_id] = next(self._ages)
        self._enter(work, work.devices)

    @property
    def wake_at_s(self) -> float | None:
        """When ``late`` will have something to take out."""
        return self._deadlines.next_s

    def pull(self, device: str) -> int | None:
        """What a device that is free does now; None where nothing waits that it may do."""
        lines = ((line, devices) for devices, line in self._lines.items() if device in devices)
        # Ages differ, so that sets are never compared.
        heads = [(head, devices) for line, devices in lines if (head := self._head(line))]
        if not heads:
            return None
        (*_, work_id), devices = min(heads)
        heappop(self._lines[devices])
        self._running[work_id] = (self._waiting.pop(work_id), device)
        self._deadlines.discard(work_id)
        return work_id

    def late(self, now_s: float) -> list[int]:
        """Take out what waits and should have begun by now."""
        late = self._deadlines.passed(now_s)
        for work_id in late:
            self._forget(work_id)
        return late

    def cancel(self, work_id: int) -> bool:
        """Take out what waits; False where it has begun or ended."""
        if work_id not in self._waiting:
            return False
        self._forget(work_id)
        return True

    def done(self, work_id: int) -> None:
        """What was pulled has come to its end."""
        del self._running[work_id]
        self._forget(work_id)

    def failed(self, work_id: int) -> bool:
        """What was pulled has failed; True where it will be tried again."""
        work, device = self._running.pop(work_id)
        failed_on = self._failed_on.setdefault(work_id, set())
        failed_on.add(device)
        if work.num_retries == 0:
            self._forget(work_id)
            return False
        again = msgspec.structs.replace(work, num_retries=work.num_retries - 1)
        self._enter(again, (work.devices - failed_on) or work.devices)
        return True

    def _enter(self, work: Work, devices: frozenset[str]) -> None:
        deadline_s = inf if work.deadline_s is None else work.deadline_s
        if work.deadline_s is not None:
            self._deadlines.add(work.work_id, work.deadline_s)
        self._waiting[work.work_id] = work
        entry = (work.priority, deadline_s, self._age[work.work_id], work.work_id)
        heappush(self._lines.setdefault(devices, []), entry)

    def _head(self, line: list[_Entry]) -> _Entry | None:
        """The first of a line that still waits."""
        while line and line[0][-1] not in self._waiting:
            heappop(line)
        return line[0] if line else None

    def _forget(self, work_id: int) -> None:
        self._waiting.pop(work_id, None)
        self._failed_on.pop(work_id, None)
        self._deadlines.discard(work_id)
        del self._age[work_id]
