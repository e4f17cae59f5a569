"""Server-sent events."""

from __future__ import annotations

import msgspec

_ENCODER = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"


def event(data: msgspec.Struct) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % _ENCODER.encode(data)


def named_event(name: str, data: msgspec.Struct) -> bytes:
    """An event with a name."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _ENCODER.encode(data))
