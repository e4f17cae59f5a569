"""What lets a client that was cut off ask again for the same answer."""

from __future__ import annotations

import msgspec


class AnswerName(msgspec.Struct, frozen=True, array_like=True):
    """What tells an answer from all others: an id, and when it was first asked for (Unix time)."""

    id: str
    created: int


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """A request that may come again, and then means the answer it had the first time.

    ``key`` is a digest of whose it is, its route and its Idempotency-Key; ``body`` one of all that
    was asked, which must be the same again. ``name`` is what the answer is called if it is new.
    One answer may take several requests to the engine: ``part`` counts them.
    """

    key: bytes
    body: bytes
    name: AnswerName
    part: int = 0
