"""Counters in shared memory: each member raises its own, and waits for those of the others.

Why this is sound. A counter has one writer and is a single aligned 64-bit store or load, so it is
never seen half written. Data come before the count that announces them: on x86 stores keep their
order, elsewhere ``publish`` puts a fence between. A waiter reads data after the count, likewise.
Whoever publishes must also not miss a sleeper: it stores its count, passes a fence and looks at the
sleepers' bytes, while a sleeper stores its byte, passes a fence and looks at the count; one of the
two always sees the other. (The bytes are looked at eight at a time; each is new or old in such a
look as in one of its own.) The kernel compares the count once more before it lets a sleeper sleep.

How a wait goes. It looks without pause, since a peer is mostly late by less than a sleep and its
end would take; after a while it offers its core between two looks to whoever else needs it; then it
sleeps, and only a sleep looks for interruptions. Spinning that was in vain costs the core, and the
peer's if that is the same one, so after each such spin more of the following waits sleep at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import sched_yield
from time import monotonic, perf_counter

from spanwise.comm import futex
from spanwise.comm.segment import Channel, Segment
from spanwise.errors import CommunicationError, WaitInterruptedError

DEFAULT_SPIN_S = 1e-3
# Only a last resort: who dies is noticed by the supervisor at once, and a step may take long.
DEFAULT_TIMEOUT_S = 3600.0

_YIELD_AFTER_S = 50e-6
# After spins in vain, the next 1, 3, 7, then always 15 waits sleep at once.
_MOST_UNSPUN = 15
# An interruption may fall between a sleeper's last look and its sleep: it looks again this often.
_SLEEP_S = 0.05
_LOW_HALF = 2**32 - 1


class Counters:
    """The counters of one channel, seen by one member. Used by one thread at a time.

    ``names`` say who the members are, for messages. ``spin_s``: how long a wait looks before it
    sleeps, as long as that pays; 0 where ranks are threads of one process.
    """

    def __init__(
        self,
        segment: Segment,
        channel: Channel,
        member: int,
        names: Sequence[str],
        *,
        spin_s: float = DEFAULT_SPIN_S,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._segment = segment
        self._words = segment.words
        self._member = member
        self._names = tuple(names)
        self._spin_s = spin_s
        self._timeout_s = timeout_s
        offsets = [channel.counter_at(other) for other in range(channel.num_members)]
        self._index = [offset // 8 for offset in offsets]
        self._own = self._index[member]
        self._address = [segment.address + offset for offset in offsets]
        self._parked = (channel.parked_at, channel.parked_at + channel.num_members)
        self._sleepers = range(channel.parked_at // 8, -(-self._parked[1] // 8))
        self._waits_for_me = bytes([member + 1])
        self._fence = futex.Fence()
        self._unspun = 0  # waits to come that sleep at once
        self._penalty = 0

    def publish(self, count: int) -> None:
        """Raise this member's counter to ``count``; what was written before is seen with it."""
        words, fence = self._words, self._fence
        if not futex.TOTAL_STORE_ORDER:
            fence()
        words[self._own] = count
        fence()
        for word in self._sleepers:
            if words[word]:
                self._wake()
                return

    def wait_for(self, other: int, count: int, operation: str) -> None:
        """Return once ``other`` has published ``count`` or more.

        Raises WaitInterruptedError after an interruption, CommunicationError after ``timeout_s``.
        """
        if self._words[self._index[other]] < count and not self._spin(other, count):
            self._sleep(other, count, operation)
        if not futex.TOTAL_STORE_ORDER:
            self._fence()

    def _wake(self) -> None:
        if self._segment.memory.find(self._waits_for_me, *self._parked) >= 0:
            futex.wake(self._address[self._member])

    def _spin(self, other: int, count: int) -> bool:
        """Look for a while, if that has paid; whether the count came."""
        if self._unspun:
            self._unspun -= 1
            return False
        words, index = self._words, self._index[other]
        start = now = perf_counter()
        while now < start + self._spin_s:
            if words[index] >= count:
                self._penalty = 0
                return True
            if now >= start + _YIELD_AFTER_S:
                sched_yield()
            now = perf_counter()
        self._unspun = self._penalty = min(2 * self._penalty + 1, _MOST_UNSPUN)
        return False

    def _sleep(self, other: int, count: int, operation: str) -> None:
        memory, parked_at = self._segment.memory, self._parked[0] + self._member
        deadline = monotonic() + self._timeout_s
        memory[parked_at] = other + 1
        try:
            while True:
                self._fence()
                seen = self._words[self._index[other]]
                if seen >= count:
                    return
                self._check(other, seen, count, operation, deadline)
                futex.wait(self._address[other], seen & _LOW_HALF, _SLEEP_S)
        finally:
            memory[parked_at] = 0

    def _check(self, other: int, seen: int, count: int, operation: str, deadline: float) -> None:
        place = f"{self._names[self._member]}: {operation} number {count}"
        if self._segment.interrupted:
            peer = self._names[other]
            raise WaitInterruptedError(f"{place} was interrupted while waiting for {peer}")
        if monotonic() >= deadline:
            raise CommunicationError(
                f"{place} waited {self._timeout_s:g} s for {self._names[other]}, which has done "
                f"{seen}; that worker hangs or is gone; see what it wrote to stderr"
            )
