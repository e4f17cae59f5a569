"""Journal entries as bytes that may end anywhere."""

from __future__ import annotations

import struct
import zlib

import msgspec

from spanwise.control.entries import Entry
from spanwise.errors import EngineError

_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<II")  # bytes of the body; checksum of length and body

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)


class FrameChain:
    """Turns entries into frames, and frames back, one after another.

    Each checksum (CRC-32) goes on from the last, the first from ``generation``. So a frame holds
    only in its place: bytes of an earlier log that lie behind the end are no part of this one, if
    a log written over another has a generation of its own.
    """

    def __init__(self, generation: int = 0) -> None:
        self._checksum = zlib.crc32(struct.pack("<Q", generation))

    def encode(self, entry: Entry) -> bytes:
        """Give the frame that follows."""
        body = _encoder.encode(entry)
        self._checksum = self._next_checksum(body)
        return _HEADER.pack(len(body), self._checksum) + body

    def decode(self, data: bytes | bytearray | memoryview) -> tuple[list[Entry], int]:
        """Read the frames that follow: their entries, and how many bytes they take.

        Ends at the first frame that is not whole: what its writer did not live to complete, zeros,
        remains of an earlier log. The chain goes on after the last whole one, so what is encoded
        next belongs right behind the bytes taken. Raises EngineError for a whole frame that is no
        entry of this version.
        """
        view = memoryview(data)
        entries: list[Entry] = []
        taken = 0
        while (body := self._whole_body(view[taken:])) is not None:
            entries.append(_entry(body))
            taken += _HEADER.size + len(body)
        return entries, taken

    def _whole_body(self, view: memoryview) -> memoryview | None:
        if len(view) < _HEADER.size:
            return None
        length, checksum = _HEADER.unpack_from(view)
        body = view[_HEADER.size : _HEADER.size + length]
        if not length or len(body) < length or self._next_checksum(body) != checksum:
            return None
        self._checksum = checksum
        return body

    def _next_checksum(self, body: bytes | memoryview) -> int:
        return zlib.crc32(body, zlib.crc32(_LENGTH.pack(len(body)), self._checksum))


def _entry(body: memoryview) -> Entry:
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise EngineError(
            f"the journal was written by another version ({error}); start without it"
        ) from error
