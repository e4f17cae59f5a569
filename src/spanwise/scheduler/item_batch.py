"""Which of the waiting items make a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from math import inf

from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.item_queue import WaitingItem

_BATCHES_LOOKED_AT = 2  # of those that would be served next, to find the ones that waste least


@dataclass(frozen=True)
class ItemBatch:
    """Items for one step. ``is_full``: nothing that waits fits in, or nothing ever could."""

    items: tuple[WaitingItem, ...]
    is_full: bool

    @property
    def cost(self) -> int:
        """What the step takes: each item is filled up to the largest."""
        return len(self.items) * max(item.request.cost for item in self.items)


def fill(head: WaitingItem, company: Iterable[WaitingItem], config: ForwardConfig) -> ItemBatch:
    """The head's batch, of the ``company`` (in order) that may share it.

    Who is sooner in priority or deadline goes in first; among equals those of about the largest
    cost so far, for whom least is filled up, and of those in order. One that would cost more than
    the limit is passed over.
    """
    items, largest, left_out = [head], head.request.cost, False
    max_cost = inf if config.max_batch_cost is None else config.max_batch_cost
    looked_at = islice(company, _BATCHES_LOOKED_AT * config.max_batch_size)
    for _, equals in groupby(looked_at, key=_urgency):
        for item in _nearest(equals, largest):
            if len(items) == config.max_batch_size:
                return ItemBatch(tuple(items), True)
            cost = max(largest, item.request.cost)
            if (len(items) + 1) * cost > max_cost:
                left_out = True
                continue
            items.append(item)
            largest = cost
    return ItemBatch(tuple(items), left_out or not leaves_room(len(items), largest, config))


def leaves_room(num_items: int, largest: int, config: ForwardConfig) -> bool:
    """Whether a batch of so many items could take one more that costs no more than the largest."""
    if config.max_batch_cost is not None and (num_items + 1) * largest > config.max_batch_cost:
        return False
    return num_items < config.max_batch_size


def _urgency(item: WaitingItem) -> tuple[int, float]:
    return item.place[:2]


def _nearest(items: Iterable[WaitingItem], cost: int) -> list[WaitingItem]:
    return sorted(items, key=lambda item: abs(item.request.cost - cost))
