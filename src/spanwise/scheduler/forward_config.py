"""What the scheduler of one replica of a forward task may spend."""

from __future__ import annotations

import math

import msgspec

from spanwise.errors import InputError


class ForwardConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one replica.

    ``max_batch_size`` bounds a batch's items, ``max_batch_cost`` (None: nothing) their number times
    the largest cost among them. A batch that could take more waits for others until its oldest item
    has waited for ``max_delay_s``. ``num_stages``: as many as the pipeline has. ``max_in_flight``
    bounds the steps planned and not yet answered: one more than ``num_stages`` hides the way to the
    engine and back. Raises InputError for a limit that leaves no way to run.
    """

    max_batch_size: int = 32
    max_batch_cost: int | None = None
    max_delay_s: float = 0.0
    num_stages: int = 1
    max_in_flight: int = 2

    def __post_init__(self) -> None:
        """Refuse limits under which no item could ever run."""
        at_least = {
            "max_batch_size": (self.max_batch_size, 1),
            "max_batch_cost": (self.max_batch_cost, 1),
            "num_stages": (self.num_stages, 1),
            "max_in_flight": (self.max_in_flight, self.num_stages),
        }
        for name, (value, least) in at_least.items():
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}; raise it")
        if not 0 <= self.max_delay_s < math.inf:
            raise InputError(f"max_delay_s must be a number from 0 up, got {self.max_delay_s}")
