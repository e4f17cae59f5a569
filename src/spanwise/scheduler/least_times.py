"""The least that a step of some shape takes, learnt from when results come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import inf
from typing import NamedTuple

_ENOUGH = 3  # steps of a shape, before they tell anything: the first ones are slow
_SURE = 0.9  # of the least seen, since times vary
_MAX_SHAPES = 1024


class _Least(NamedTuple):
    num_steps: int = 0
    cost: float = inf
    taken_s: float = inf


class LeastTimes:
    """For each of the shapes seen lately, the least time of a step and the least cost of a batch.

    An item that costs no less than the smallest batch takes no less than the fastest step, and a
    smaller one no less than its part of that, since a batch takes no longer than its items one
    after another.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Least] = OrderedDict()

    def add(self, shape: Hashable, cost: int, taken_s: float) -> None:
        """A batch of this cost took so long."""
        known = self._known.pop(shape, _Least())
        self._known[shape] = _Least(
            known.num_steps + 1, min(known.cost, cost), min(known.taken_s, taken_s)
        )
        if len(self._known) > _MAX_SHAPES:
            self._known.popitem(last=False)

    def of(self, shape: Hashable, cost: int) -> float:
        """What an item of this cost takes at least, in seconds; 0 where that is not known."""
        known = self._known.get(shape, _Least())
        if known.num_steps < _ENOUGH:
            return 0.0
        return _SURE * known.taken_s * min(1.0, cost / known.cost)
