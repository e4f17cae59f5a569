"""Columns dealt in units: a unit is the smallest block that may not be cut."""

from __future__ import annotations

from spanwise.errors import LayoutError
from spanwise.layout.split import split_evenly


def column_shares(total: int, parts: int, unit: int = 1) -> tuple[range, ...]:
    """Cut ``range(total)`` columns into ``parts`` runs of whole units, longer runs first.

    Runs are empty at the end where units are fewer than parts. Raises LayoutError where ``total``
    is no multiple of ``unit``.
    """
    assert unit >= 1, unit
    if total % unit:
        raise LayoutError(
            f"{total} columns cannot be dealt in units of {unit},"
            f" {total % unit} would be left over; use a unit that divides {total}"
        )
    shares = split_evenly(total // unit, parts)
    return tuple(range(share.start * unit, share.stop * unit) for share in shares)
