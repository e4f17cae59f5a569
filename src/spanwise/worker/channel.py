"""Messages between two processes over a unix socket pair: msgspec records, and open files."""

from __future__ import annotations

import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from spanwise.errors import EngineError

Incoming = TypeVar("Incoming")

_HEADER = struct.Struct("<QI")  # bytes of the body, open files that come with it
_CHUNK_BYTES = 1 << 18
_FD_BYTES = array("i").itemsize
_FDS_SPACE = socket.CMSG_SPACE(64 * _FD_BYTES)
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

_encoder = msgspec.msgpack.Encoder()


class ChannelClosed(EngineError):  # noqa: N818 - named after what happens, as WaitInterruptedError is
    """The other side has closed, or is gone."""


def encode(message: msgspec.Struct) -> bytes:
    """Give the bytes of one message, to post on any number of channels."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body), 0) + body


class Channel(Generic[Incoming]):
    """One end: sends any record, receives those of one (union) type, in order.

    A socket pair and not zmq or files: it has no threads and survives a fork, leaves nothing on
    disk, and its end tells at once that the other process is gone. Not for several threads.
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._outbox: deque[memoryview] = deque()
        self._is_closed = False

    def fileno(self) -> int:
        """For selectors: readable when a message, or the end, has come."""
        return self._socket.fileno()

    def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send, waiting while the other side is slow. Raises ChannelClosed."""
        self._write_outbox(0)
        body = _encoder.encode(message)
        frame = memoryview(_HEADER.pack(len(body), len(fds)) + body)
        try:
            sent = socket.send_fds(self._socket, [frame], list(fds)) if fds else 0
            self._socket.sendall(frame[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other side of a channel is gone") from error

    def post(self, frame: bytes) -> bool:
        """Queue an encoded message and send what fits, never waiting; see ``flush``."""
        self._outbox.append(memoryview(frame))
        return self.flush()

    def flush(self) -> bool:
        """Send what fits of the queued messages; True when none is left. Raises ChannelClosed."""
        self._write_outbox(socket.MSG_DONTWAIT)
        return not self._outbox

    def receive(self) -> Incoming:
        """Wait for the next message. Raises ChannelClosed at the end."""
        return self.receive_with_fds()[0]

    def receive_with_fds(self) -> tuple[Incoming, tuple[int, ...]]:
        """Wait for the next message and the open files sent with it, now the caller's to close."""
        while (entry := self._next()) is None:
            self._read(0)
        return entry

    def arrived(self) -> Iterator[tuple[Incoming, tuple[int, ...]]]:
        """Give every message that has come, without waiting; ends with ChannelClosed at the end."""
        while True:
            while (entry := self._next()) is not None:
                yield entry
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return

    def finish(self) -> None:
        """Tell the other side that nothing more will come; receiving goes on."""
        if not self._is_closed:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:  # already gone, which is as finished as can be
                return

    def close(self) -> None:
        """Close this end and every received file nobody took."""
        self._is_closed = True
        self._socket.close()
        while self._fds:
            socket.close(self._fds.popleft())

    def _next(self) -> tuple[Incoming, tuple[int, ...]] | None:
        if len(self._inbox) < _HEADER.size:
            return None
        length, num_fds = _HEADER.unpack_from(self._inbox)
        end = _HEADER.size + length
        if len(self._inbox) < end:
            return None
        with memoryview(self._inbox) as view:
            message = self._decoder.decode(view[_HEADER.size : end])
        del self._inbox[:end]
        return message, tuple(self._fds.popleft() for _ in range(num_fds))

    def _read(self, flags: int) -> None:
        try:
            # Not socket.recv_fds, which forgets the flags.
            data, ancillary, _, _ = self._socket.recvmsg(
                _CHUNK_BYTES, _FDS_SPACE, flags | _RECEIVE_FLAGS
            )
        except ConnectionResetError:
            data, ancillary = b"", []
        if not data:
            raise ChannelClosed("the other side of a channel is gone")
        self._inbox += data
        for _, _, numbers in ancillary:
            self._fds.extend(array("i", numbers[: len(numbers) // _FD_BYTES * _FD_BYTES]))

    def _write_outbox(self, flags: int) -> None:
        try:
            while self._outbox:
                sent = self._socket.send(self._outbox[0], flags)
                self._outbox[0] = self._outbox[0][sent:]
                if not self._outbox[0]:
                    self._outbox.popleft()
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed("the other side of a channel is gone") from error
