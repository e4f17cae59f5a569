"""Where a program of many operations may be cut: few places, and such where little is carried."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

MAX_PIECES = 64
# Of the program's flops and of its weights, which make 2 together.
_LEAST_SHARE = 2 / MAX_PIECES
_NEIGHBOURHOOD = 1 / 2
_HILL = 1.25


def choose_borders(
    carried_bytes: Sequence[int | None], flops: Sequence[float], weight_bytes: Sequence[float]
) -> list[int]:
    """The places to cut ``flops``' operations at, rising; place ``i`` is before operation ``i``.

    ``carried_bytes[i - 1]``: of place ``i``, one fewer than operations; None: cannot be cut there.
    The cheapest come first, never two with less than a 64th of the work between them, and none that
    has clearly cheaper ones near by on both sides, as within a residual block. Depends on nothing
    but its arguments: every process of a model cuts alike.
    """
    places = _shares(flops, weight_bytes)
    allowed = _off_the_hills(carried_bytes, places[1:-1])
    # Of equals the last: what only changes a value in passing stays with what made it.
    allowed.sort(key=lambda place: (carried_bytes[place - 1], -place))
    chosen, taken = list[int](), [places[0], places[-1]]
    for place in allowed:
        share = places[place]
        after = bisect_left(taken, share)
        if taken[after] - share >= _LEAST_SHARE and share - taken[after - 1] >= _LEAST_SHARE:
            chosen.append(place)
            insort(taken, share)
    return sorted(chosen)


def _shares(flops: Sequence[float], weight_bytes: Sequence[float]) -> list[float]:
    """How much of the work lies before each place, from 0 to 2, both ends too."""
    parts = [_running_share(flops), _running_share(weight_bytes)]
    return [a + b for a, b in zip(*parts, strict=True)]


def _running_share(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts) or 1.0
    return [amount / total for amount in accumulate(amounts, initial=0.0)]


def _off_the_hills(carried_bytes: Sequence[int | None], shares: Sequence[float]) -> list[int]:
    before = _least_before(carried_bytes, shares)
    after = _least_before(carried_bytes[::-1], [-share for share in shares[::-1]])[::-1]
    return [
        place
        for place, (own, *others) in enumerate(zip(carried_bytes, before, after, strict=True), 1)
        if own is not None and own <= _HILL * max(others)
    ]


def _least_before(carried_bytes: Sequence[int | None], shares: Sequence[float]) -> list[float]:
    """The least carried at each place or in its neighbourhood before it."""
    least = list[float]()
    window: deque[tuple[float, float]] = deque()  # (bytes, share), both rising
    for carried, share in zip(carried_bytes, shares, strict=True):
        while window and window[0][1] < share - _NEIGHBOURHOOD:
            window.popleft()
        if carried is not None:
            while window and window[-1][0] >= carried:
                window.pop()
            window.append((carried, share))
        least.append(window[0][0] if window else float("inf"))
    return least
