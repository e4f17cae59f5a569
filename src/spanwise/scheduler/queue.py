"""Sequences that wait to be admitted, and which of them is next."""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain

from spanwise.scheduler.sequence import Sequence
from spanwise.scheduler.service import Service

_Line = OrderedDict[int, Sequence]  # the waiting of one tenant and priority by arrival


class WaitingQueue:
    """Smaller priority first; among equals those that had begun, by arrival, and then the others.

    Of the others the tenant with the least service so far is next, within a tenant by arrival.
    ``num_tokens`` are the tokens of all, each sequence's as many as they were when it came.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._begun: list[Sequence] = []
        self._fresh: dict[int, dict[str, _Line]] = {}
        self._num_fresh: Counter[str] = Counter()
        self._num_tokens: dict[int, int] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._num_tokens)

    def __iter__(self) -> Iterator[Sequence]:
        """All, by priority, but otherwise in no order that says who is next."""
        lines = (line for p in sorted(self._fresh) for line in self._fresh[p].values())
        return chain(self._begun, *(line.values() for line in lines))

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait; one that has not begun is the youngest."""
        tokens = self._num_tokens[sequence.sequence_id] = len(sequence.tokens)
        self.num_tokens += tokens
        if sequence.has_begun:
            insort(self._begun, sequence, key=_urgency)
            return
        tenant = sequence.request.tenant
        if tenant not in self._num_fresh:
            self._service.join(tenant, self._num_fresh)
        self._num_fresh[tenant] += 1
        lines = self._fresh.setdefault(sequence.request.priority, {})
        lines.setdefault(tenant, OrderedDict())[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        self.num_tokens -= self._num_tokens.pop(sequence.sequence_id)
        if sequence.has_begun:
            self._begun.remove(sequence)
        else:
            self._remove_fresh(sequence, sequence.request.priority, sequence.request.tenant)

    def first(
        self, passed_over: Container[int] = (), batch: Container[int] | None = None
    ) -> Sequence | None:
        """Who is next of those not ``passed_over``.

        ``batch`` are the only ones that may begin: all that came before others of their priority
        and tenant.
        """
        begun = next((s for s in self._begun if s.sequence_id not in passed_over), None)
        for priority in sorted(self._fresh):
            if begun is not None and begun.request.priority <= priority:
                break
            heads = (_head(line, passed_over, batch) for line in self._fresh[priority].values())
            if found := [head for head in heads if head is not None]:
                return min(found, key=self._turn)
        return begun

    def fresh(self) -> Iterator[Sequence]:
        """Those that have not begun, in the order they would be admitted if nothing else came."""
        admitted: Counter[str] = Counter()
        for priority in sorted(self._fresh):
            turns = []
            for line in self._fresh[priority].values():
                rest = iter(line.values())
                head = next(rest)
                turns.append((self._turn(head, admitted), head, rest))
            heapify(turns)  # arrivals differ, so that sequences are never compared
            while turns:
                _, sequence, rest = heappop(turns)
                yield sequence
                admitted[sequence.request.tenant] += len(sequence.tokens)
                if following := next(rest, None):
                    heappush(turns, (self._turn(following, admitted), following, rest))

    def _turn(self, sequence: Sequence, admitted: Counter[str] | None = None) -> tuple[int, int]:
        tenant = sequence.request.tenant
        expected = admitted[tenant] if admitted else 0
        return self._service.of(tenant) + expected, sequence.arrival

    def _remove_fresh(self, sequence: Sequence, priority: int, tenant: str) -> None:
        lines = self._fresh[priority]
        del lines[tenant][sequence.sequence_id]
        if not lines[tenant]:
            del lines[tenant]
        if not lines:
            del self._fresh[priority]
        self._num_fresh[tenant] -= 1
        if not self._num_fresh[tenant]:
            del self._num_fresh[tenant]


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency


def _head(
    line: _Line, passed_over: Container[int], batch: Container[int] | None
) -> Sequence | None:
    head = next((s for s in line.values() if s.sequence_id not in passed_over), None)
    if head is None or batch is None or head.sequence_id in batch:
        return head
    return None
