"""Contiguous splits of a row of things over parts: evenly by count, or by weight."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from spanwise.errors import LayoutError

_Cost = Callable[[int, int, int], float]  # of (part, start, end)
_Join = Callable[[float, float], float]
_Best = dict[int, tuple[float, list[int]]]  # by end: the joined cost and the borders that give it


def split_evenly(total: int, parts: int) -> tuple[range, ...]:
    """Cut ``range(total)`` into ``parts`` runs of sizes that differ by at most one, longer first.

    Runs are empty at the end where ``total < parts``.
    """
    assert total >= 0 and parts >= 1, (total, parts)
    size, extra = divmod(total, parts)
    starts = [part * size + min(part, extra) for part in range(parts + 1)]
    return _runs(starts)


def split_by_weight(
    weights: Sequence[float], parts: int, loads: Sequence[float] | None = None
) -> tuple[range, ...]:
    """Cut ``range(len(weights))`` into ``parts`` runs of at least one item, the heaviest lightest.

    ``loads[p]`` is weight that part p carries anyway. Among the splits with the lightest heaviest
    part, the one with the smallest sum of squares is taken, so that the other parts are balanced
    too; equal weights give ``split_evenly``. Raises LayoutError where items are fewer than parts.
    """
    if not 1 <= parts <= len(weights):
        raise LayoutError(
            f"{len(weights)} items cannot be split into {parts} parts of at least one;"
            f" use from 1 to {len(weights)} parts"
        )
    fixed = [0] * parts if loads is None else loads
    assert len(fixed) == parts, (len(fixed), parts)
    assert all(0 <= weight < math.inf for weight in (*weights, *fixed)), "weights are finite, >= 0"
    prefix = [0, *accumulate(weights)]

    def cost(part: int, start: int, end: int) -> float:
        return fixed[part] + prefix[end] - prefix[start]

    heaviest, _ = _best_cuts(len(weights), parts, cost, max)

    def balance(part: int, start: int, end: int) -> float:
        weight = cost(part, start, end)
        return weight**2 if weight <= heaviest else math.inf

    _, cuts = _best_cuts(len(weights), parts, balance, operator.add)
    return _runs(cuts)


def _best_cuts(num_items: int, parts: int, cost: _Cost, join: _Join) -> tuple[float, list[int]]:
    """Return the smallest joined cost of ``parts`` runs, and the borders that give it.

    Exact dynamic programming over (part, end); ties leave the later part the shorter one.
    """
    best: _Best = {end: (cost(0, 0, end), [0, end]) for end in range(1, num_items + 1)}
    for part in range(1, parts):
        best = {
            end: _extended(best, part, end, cost, join) for end in range(part + 1, num_items + 1)
        }
    return best[num_items]


def _extended(
    best: _Best, part: int, end: int, cost: _Cost, join: _Join
) -> tuple[float, list[int]]:
    def total(start: int) -> float:
        return join(best[start][0], cost(part, start, end))

    start = min(range(end - 1, part - 1, -1), key=total)
    return total(start), [*best[start][1], end]


def _runs(borders: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(start, end) for start, end in pairwise(borders))
