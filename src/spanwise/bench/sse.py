"""Server-sent events out of bytes, wherever the bytes were cut.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations


class EventSplitter:
    """Gives the ``data`` of each event once it is whole; names, ids and comments are passed over.

    An event that the stream's end cuts off never comes.
    """

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the stream's next bytes; give the data of the events that they complete."""
        text = self._pending + piece if self._pending else piece
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):  # its line feed may still be on the way
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = text.split(b"\n\n")
        self._pending = rest + held
        return [data for event in events if (data := _data(event)) is not None]


def _data(event: bytes) -> bytes | None:
    """The data lines of one event, or None where it has none."""
    if event.startswith(b"data: ") and b"\n" not in event:  # nearly all of them
        return event[6:]
    lines = [line.partition(b":") for line in event.split(b"\n")]
    data = [value.removeprefix(b" ") for field, _, value in lines if field == b"data"]
    return b"\n".join(data) if data else None
