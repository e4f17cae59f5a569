"""HTTP/1.1 to one server, as cheaply as a measurement needs it.

A general client takes 45 to 80 us of processor time for every piece of a stream; asyncio with
httptools takes 7 to 22, which leaves the core to the server under test and the times sharp.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools

from spanwise.errors import InputError

# A server may close what is idle while a request is on its way; most wait 5 s or longer.
_MAX_IDLE_S = 3.0

Sink = Callable[[int, bytes, float], None]
"""Takes status, a piece of the body, and when it came (``perf_counter``). Must not raise."""


class ConnectError(Exception):
    """No connection could be made."""


class BrokenResponseError(Exception):
    """The connection ended before a response had begun, or what came is not HTTP."""


class Origin:
    """One server: makes connections, and keeps those that may be used again."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise InputError(f"{url!r:.200} is no URL: {error}") from error
        if not parts.hostname:
            raise InputError(f"{url!r:.200} names no host; write http://localhost:8000")
        self._is_secure = parts.scheme == "https"
        self._address: tuple[str, int] = (parts.hostname, port or (443 if self._is_secure else 80))
        self._name = parts.hostname
        self._netloc = parts.netloc
        self._path = parts.path
        self._tls = ssl.create_default_context() if self._is_secure else None
        self._idle: list[tuple[float, _Connection]] = []

    def request(self, method: str, path: str, api_key: str | None, body: bytes = b"") -> bytes:
        """Give the bytes of a request."""
        headers = [
            f"{method} {self._path}{path} HTTP/1.1",
            f"Host: {self._netloc}",
            "User-Agent: spanwise-bench",
            "Accept: application/json, text/event-stream",
        ]
        if body:
            headers += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*headers, "", ""]).encode() + body

    async def exchange(self, request: bytes, sink: Sink) -> str | None:
        """Send a request; return when its response has ended, as it should or not.

        Gives its Retry-After, None where it has none. Raises ConnectError, or BrokenResponseError
        where no response came. A cancelled exchange closes its connection.
        """
        connection = self._kept() or await self._connect()
        try:
            await connection.exchange(request, sink)
        finally:
            if connection.is_free:
                self._idle.append((perf_counter(), connection))
            else:
                connection.close()
        return connection.retry_after

    def close(self) -> None:
        """Close what is idle."""
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    def _kept(self) -> _Connection | None:
        while self._idle:
            since, connection = self._idle.pop()
            if connection.is_free and perf_counter() - since < _MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        server_hostname = self._name if self._is_secure else None
        try:
            transport, connection = await loop.create_connection(
                _Connection, *self._address, ssl=self._tls, server_hostname=server_hostname
            )
        except OSError as error:
            raise ConnectError(error.strerror or str(error)) from error
        # The address that worked, so that a name is looked up once.
        self._address = transport.get_extra_info("peername")[:2]
        return connection


class _Connection(asyncio.Protocol):
    """One connection, and the response that is under way on it."""

    def __init__(self) -> None:
        self.retry_after: str | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._status = 0
        self._now = 0.0
        self._is_open = False

    @property
    def is_free(self) -> bool:
        """Whether another request may be sent."""
        return self._is_open and self._ended is None

    async def exchange(self, request: bytes, sink: Sink) -> None:
        assert self.is_free and self._transport is not None
        self._sink, self._status, self.retry_after = sink, 0, None
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended
        if self._is_open:
            self._ended = None

    def close(self) -> None:
        self._is_open = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport, self._is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        if self._ended is None or self._ended.done():  # a farewell nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._is_open = False
        if self._ended is None or self._ended.done():
            return
        if self._status:  # whether the body is whole is for its reader to say
            self._ended.set_result(None)
        else:
            self._break(str(error) if error else "closed with no answer")

    # --- called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        assert self._sink is not None
        self._sink(self._status, body, self._now)

    def on_message_complete(self) -> None:
        if self._status < 200:  # informational: the response itself is still to come
            self._status = 0
            return
        if not self._parser.should_keep_alive():
            self._is_open = False
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _break(self, said: str) -> None:
        self._is_open = False
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(BrokenResponseError(said))
