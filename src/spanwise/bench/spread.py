"""What several runs of one thing gave."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """The middle one, the lowest and the highest."""

    median: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """As "12.3 (11.9..13.0)", each times ``scale``."""
        numbers = (f"{each * scale:,.{digits}f}" for each in (self.median, self.low, self.high))
        return "{} ({}..{})".format(*numbers)


def spread(values: Iterable[float]) -> Spread:
    """Of one value or more."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1])
