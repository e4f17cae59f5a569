"""Checks of whole numbers that a measurement is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from spanwise.errors import InputError


def at_least(name: str, value: int | None, low: int) -> None:
    """Raise InputError where a value is given and below ``low``."""
    if value is not None and value < low:
        raise InputError(f"{name} must be {low} or more, got {value}")


def rising(name: str, values: Sequence[int]) -> None:
    """Raise InputError unless the values are one or more, each above the one before, from 1."""
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        said = ",".join(map(str, values))
        raise InputError(f"{name} must rise from 1 or more, such as 1,2,4, got {said!r:.80}")
