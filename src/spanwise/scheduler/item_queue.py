"""Items that wait for their step, and which of them are next."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from operator import attrgetter

from spanwise.scheduler.item import ItemRequest
from spanwise.scheduler.service import Service

_Place = tuple[int, float, int]  # priority, deadline (inf: none), arrival


class WaitingItem:
    """An item and its place among those that wait.

    ``num_steps`` had been planned when it came, which was seen at ``seen_s``. ``was_passed``: a
    full batch went before its growing one. A newer item of a stream has the place and the age of
    the ``older`` one that it stands for: else a stream whose items come faster than they are served
    would never be first.
    """

    def __init__(
        self,
        request: ItemRequest,
        arrival: int,
        num_steps: int,
        older: WaitingItem | None = None,
    ) -> None:
        due_s = inf if request.deadline_s is None else request.deadline_s
        self.request = request
        self.num_steps = num_steps
        self.seen_s: float | None = None
        self.was_passed = False
        if older is not None:
            due_s, arrival = min(due_s, older.place[1]), older.place[2]
            self.num_steps, self.seen_s = older.num_steps, older.seen_s
            self.was_passed = older.was_passed
        self.place: _Place = (request.priority, due_s, arrival)

    @property
    def tier(self) -> int:
        """Batches hold items of one tier: all that is urgent, or one priority above 0."""
        return max(self.request.priority, 0)


_Lane = dict[str, list[WaitingItem]]  # what may share a batch: of each tenant, by place
_by_place = attrgetter("place")


class ItemQueue:
    """Smaller priority first; among equals the earliest deadline, those without one last.

    Of equal ones the tenant with the least service so far is next, within a tenant by arrival.
    ``total_cost`` is that of all, each by itself.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._items: dict[int, WaitingItem] = {}
        self._tiers: dict[int, dict[Hashable, _Lane]] = {}
        self._num_of: Counter[str] = Counter()
        self.total_cost = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[WaitingItem]:
        """All, in the order they came."""
        return iter(self._items.values())

    def get(self, sequence_id: int) -> WaitingItem | None:
        """The item, if it waits."""
        return self._items.get(sequence_id)

    def add(self, item: WaitingItem) -> None:
        """Let an item wait."""
        request = item.request
        tenant = request.tenant
        if tenant not in self._num_of:
            self._service.join(tenant, self._num_of)
        self._num_of[tenant] += 1
        self._items[request.sequence_id] = item
        self.total_cost += request.cost
        lane = self._tiers.setdefault(item.tier, {}).setdefault(request.shape, {})
        insort(lane.setdefault(tenant, []), item, key=_by_place)

    def remove(self, item: WaitingItem) -> None:
        """Take an item out, wherever it stands."""
        request = item.request
        del self._items[request.sequence_id]
        self.total_cost -= request.cost
        lanes = self._tiers[item.tier]
        lane = lanes[request.shape]
        line = lane[request.tenant]
        del line[bisect_left(line, item.place, key=_by_place)]
        if not line:
            del lane[request.tenant]
        if not lane:
            del lanes[request.shape]
        if not lanes:
            del self._tiers[item.tier]
        self._num_of[request.tenant] -= 1
        if not self._num_of[request.tenant]:
            del self._num_of[request.tenant]

    def heads(self) -> list[WaitingItem]:
        """Who is first of each shape, in order; only of the tier that is to be served now."""
        lanes = self._tiers[min(self._tiers)] if self._tiers else {}
        firsts = [[line[0] for line in lane.values()] for lane in lanes.values()]
        return sorted((min(found, key=self._turn) for found in firsts), key=self._turn)

    def company(self, head: WaitingItem) -> Iterator[WaitingItem]:
        """The others that may share a batch with it, in the order they would be served."""
        planned = Counter({head.request.tenant: head.request.cost})
        turns = []
        for line in self._tiers[head.tier][head.request.shape].values():
            rest = (item for item in line if item is not head)
            if first := next(rest, None):
                turns.append((self._turn(first, planned), first, rest))
        heapify(turns)  # arrivals differ, so that items are never compared
        while turns:
            _, item, rest = heappop(turns)
            yield item
            planned[item.request.tenant] += item.request.cost
            if following := next(rest, None):
                heappush(turns, (self._turn(following, planned), following, rest))

    def alike(self, item: WaitingItem) -> list[int]:
        """What it and the others that may share a batch with it cost, in no order."""
        lane = self._tiers[item.tier][item.request.shape]
        return [other.request.cost for line in lane.values() for other in line]

    def eldest(self, priority: int) -> WaitingItem | None:
        """Of this priority and without a deadline, who came first."""
        found = []
        place: _Place = (priority, inf, -1)
        for lane in self._tiers.get(max(priority, 0), {}).values():
            for line in lane.values():
                index = bisect_left(line, place, key=_by_place)
                if index < len(line) and line[index].request.priority == priority:
                    found.append(line[index])
        return min(found, key=_by_place, default=None)

    def _turn(
        self, item: WaitingItem, planned: Counter[str] | None = None
    ) -> tuple[int, float, int, int]:
        priority, due_s, arrival = item.place
        tenant = item.request.tenant
        service = self._service.of(tenant) + (planned[tenant] if planned else 0)
        return priority, due_s, service, arrival
