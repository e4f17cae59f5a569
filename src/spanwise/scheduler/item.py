"""What the scheduler of forward tasks is asked for: one item."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from spanwise.types.forward import TensorData


class ItemRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One item to compute. ``sequence_id`` is never used twice in a scheduler's life.

    Only items of equal ``shape`` share a batch; to put lengths into buckets is up to the caller.
    ``cost`` is what the item takes by itself, in any unit (its tokens, or 1); a batch costs its
    number of items times the largest of them, since the others are filled up to it.
    ``priority``: the smaller, the sooner; above 0 it is background work. ``tenant``: whose share
    of the service it takes. ``deadline_s``, on the caller's clock: it is of no use any more unless
    its step has been planned by then. ``stream``: a newer item of the same tenant's stream takes
    the place of an older one that still waits; "" is no stream.
    """

    sequence_id: int
    inputs: tuple[TensorData, ...]
    shape: Hashable = ()
    cost: int = 1
    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    stream: str = ""
