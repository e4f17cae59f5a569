"""Accepts connections, as many as may be open."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.gate import Gate
from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.protocol import LimitedHttpProtocol
from spanwise.server.transport.refusal import TOO_MANY_CONNECTIONS, new_request_id

_BACKLOG = 2048
# So that a flood of connections leaves time for those that are open.
_ACCEPTS_AT_ONCE = 32
_REST_S = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# What the kernel keeps unsent of a stream whose client does not read; it grows to megabytes.
_KERNEL_UNSENT_BYTES = 16 * 2**10

_logger = logging.getLogger(__name__)


class Listener:
    """Takes what connects to a bound socket, which it owns from then on.

    Connections are counted from accept on, so that a TLS handshake that does not come to an end
    has a place like any other. Whoever finds none is told so and closed.
    """

    def __init__(
        self,
        listening: socket.socket,
        tls: ssl.SSLContext | None,
        limits: TransportLimits,
        gate: Gate,
        access_log: AccessLog,
        protocol: Callable[[], LimitedHttpProtocol],
    ) -> None:
        self._socket = listening
        self._tls = tls
        self._limits = limits
        self._gate = gate
        self._access_log = access_log
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._rest: asyncio.TimerHandle | None = None
        self._connecting: dict[asyncio.Task[None], _Beginning] = {}
        self._lingering: set[_Farewell] = set()

    def open(self) -> None:
        """Accept from now on."""
        is_tcp = self._socket.family in (socket.AF_INET, socket.AF_INET6)
        if is_tcp and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            option = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _KERNEL_UNSENT_BYTES)
            self._socket.setsockopt(*option)  # whatever is accepted inherits it
        self._socket.setblocking(False)
        self._socket.listen(_BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept nothing more, and end what has not got through its handshake."""
        if self._rest is not None:
            self._rest.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for beginning in self._connecting.values():
            if not beginning.protocol.is_connected:
                beginning.end()
        for farewell in self._lingering:
            farewell.end()

    def _resume(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                _logger.warning("cannot accept connections: %s", error.strerror)
                self._loop.remove_reader(self._socket.fileno())
                self._rest = self._loop.call_later(_REST_S, self._resume)
                return
            connection.setblocking(False)
            self._admit(connection, address[0] if isinstance(address, tuple) else "")

    def _admit(self, connection: socket.socket, host: str) -> None:
        protocol = self._protocol()
        beginning = _Beginning(connection, protocol)

        def evict() -> None:
            if protocol.is_connected:
                protocol.evict()
            else:
                beginning.end()

        place = self._gate.enter(host, evict, self._loop.time())
        if place is None:
            self._turn_away(connection)
            return

        def end(task: asyncio.Task[None]) -> None:
            del self._connecting[task]
            if not protocol.is_connected:  # no connection came of it
                connection.close()
                place.leave()

        protocol.place = place
        task = self._loop.create_task(self._connect(connection, protocol))
        self._connecting[task] = beginning
        task.add_done_callback(end)

    async def _connect(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        """Make the handshake, if there is one to make, and hand the connection over."""
        timeouts = {}
        if self._tls is not None:
            timeouts = {
                "ssl_handshake_timeout": self._limits.headers_timeout_s,
                "ssl_shutdown_timeout": self._limits.write_window_s,
            }
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._tls, **timeouts
            )
        except OSError as error:  # whatever a client may do wrong in a handshake
            _logger.debug("a connection ended before it began: %s", error)

    def _turn_away(self, connection: socket.socket) -> None:
        """Say that there is no place, and close; nothing is said before a handshake."""
        if self._tls is not None:
            connection.close()
            return
        request_id = new_request_id()
        response = TOO_MANY_CONNECTIONS.response(request_id)
        self._access_log.refused(TOO_MANY_CONNECTIONS.status, request_id)
        if len(self._lingering) < self._limits.max_num_lingering:
            farewell = _Farewell(response, self._limits.linger_s, self._lingering)
            task = self._loop.create_task(self._connect(connection, farewell))
            self._connecting[task] = _Beginning(connection, farewell)
            task.add_done_callback(self._connecting.__delitem__)
            return
        with connection, suppress(OSError):  # gone already
            connection.send(response)


@dataclass(frozen=True)
class _Beginning:
    """A connection that may not have got through its handshake yet."""

    connection: socket.socket
    protocol: LimitedHttpProtocol | _Farewell

    def end(self) -> None:
        """End it from below, as a client does that goes away.

        Cancelling the task that waits for it would close it, at times after its ``connection_made``
        and then with no call of ``connection_lost``.
        """
        with suppress(OSError):  # gone already
            self.connection.shutdown(socket.SHUT_RDWR)


class _Farewell(asyncio.Protocol):
    """Answers whatever comes with one response; a plain close might take it from the client."""

    def __init__(self, response: bytes, linger_s: float, lingering: set[_Farewell]) -> None:
        self._response = response
        self._linger_s = linger_s
        self._lingering = lingering
        self._transport: asyncio.Transport | None = None
        lingering.add(self)

    @property
    def is_connected(self) -> bool:
        """Whether there is, or was, a connection."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._response)
        transport.write_eof()
        asyncio.get_running_loop().call_later(self._linger_s, self.end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.discard(self)

    def end(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()
