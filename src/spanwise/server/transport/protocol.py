"""HTTP/1.1 on one connection: uvicorn's protocol, with limits."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from spanwise.errors import SpanwiseError
from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.envelope import REFUSED
from spanwise.server.transport.gate import Gate, Place
from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.meter import RequestMeter
from spanwise.server.transport.refusal import (
    BODY_TOO_SLOW,
    HEADERS_TOO_SLOW,
    MALFORMED,
    SHUTTING_DOWN,
    TOO_MANY_BODIES,
    Refusal,
    RefusedError,
    new_request_id,
)

# What is overridden, read or set here without being promised to anybody.
_METHODS = (
    *("connection_made", "connection_lost", "eof_received", "data_received", "shutdown"),
    *("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body"),
    *("on_message_complete", "on_response_complete", "pause_writing", "resume_writing"),
    *("timeout_keep_alive_handler", "_unset_keepalive_if_required"),
)
_ATTRIBUTES = frozenset(
    {"parser", "cycle", "flow", "headers", "loop", "server_state", "timeout_keep_alive",
     "transport", "ws_protocol_class"}
)  # fmt: skip
_CYCLE_ATTRIBUTES = frozenset(
    {"disconnected", "message_event", "response_complete", "response_started",
     "scope", "waiting_for_100_continue"}
)  # fmt: skip


def _check_uvicorn() -> None:
    """Raise SpanwiseError where uvicorn is not built as this module takes it to be."""
    missing = [name for name in _METHODS if not hasattr(HttpToolsProtocol, name)]
    missing += sorted(_ATTRIBUTES - set(HttpToolsProtocol.__init__.__code__.co_names))
    missing += sorted(_CYCLE_ATTRIBUTES - set(RequestResponseCycle.__init__.__code__.co_names))
    if missing or not hasattr(httptools_impl, "httptools"):
        raise SpanwiseError(
            f"uvicorn {uvicorn.__version__} is built differently: {', '.join(missing)} of its "
            "httptools protocol is gone; install uvicorn 0.54"
        )


_check_uvicorn()


class LimitedHttpProtocol(HttpToolsProtocol):
    """Refuses while parsing what is too much, and gives up on a client that is too slow.

    A connection waits for headers, then receives a request, then answers it; a response may begin
    before the request is whole. ``_answering`` holds the exchanges whose response is not complete,
    the oldest first: more than one where a client pipelines.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limits: TransportLimits,
        gate: Gate,
        access_log: AccessLog,
    ) -> None:
        super().__init__(config, server_state, app_state)
        assert self.ws_protocol_class is None
        self.timeout_keep_alive = limits.keep_alive_timeout_s  # type: ignore[assignment]
        self.place: Place | None = None
        self._limits = limits
        self._gate = gate
        self._access_log = access_log
        self._meter = RequestMeter(limits)
        self._answering: deque[RequestResponseCycle] = deque()
        self._is_refused = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._held_bytes = 0
        self._seen_body_bytes = 0
        self._body_windows = 0
        self._is_excused = False
        self._unsent_bytes = 0

    @property
    def is_connected(self) -> bool:
        """Whether there is, or was, a connection; there is none before its TLS handshake."""
        transport: asyncio.Transport | None = self.transport
        return transport is not None

    # -- the connection --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        if self._gate.is_closed:
            self.shutdown()
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every application that still answers."""
        self._stop_reading_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        self._disconnect()
        self._release_body()
        super().connection_lost(exc)
        if self.place is not None:
            self.place.leave()

    def evict(self) -> None:
        """End a connection that has no request, for another's sake."""
        self.transport.abort()

    def shutdown(self) -> None:
        """End the connection once it has nothing to answer."""
        if self._is_refused:
            return
        if self._meter.has_begun and not self._answering:
            self._refuse(SHUTTING_DOWN)
            return
        super().shutdown()
        self._watch_end()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._watch_end()

    # -- what arrives ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, in pieces that cannot hold more than one request's headers may."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest and not self._is_refused:
            size = self._meter.room_bytes
            self._parse(rest[:size])
            rest = rest[size:]
        if self._read_timer is None and not self._is_refused:
            self._await_rest()

    def _parse(self, data: memoryview) -> None:
        self._meter.feed(len(data))
        try:
            self.parser.feed_data(data)
            self._meter.check()
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(_refusal_of(error))
        except RefusedError as error:
            self._refuse(error.refusal)

    def _parse_without_upgrade(self, rest: memoryview) -> None:
        """Take a request that offers another protocol as if it did not.

        Java's client offers HTTP/2 on its first request, and the parser drops that one's body.
        """
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        for data in (memoryview(b"\r\n".join([*lines, b"", b""])), rest):
            if data and not self._is_refused:
                self._parse(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self._answering) >= self._limits.max_num_pipelined:
            raise RefusedError(MALFORMED)
        self._meter.begin()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the URL, refused before it is kept."""
        self._meter.url(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, refused before it is kept. Trailers come this way too, and are dropped."""
        self._meter.header(name, value)
        if not self._meter.has_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application."""
        if self.parser.get_method() == b"CONNECT" or httptools.parse_url(self.url).path is None:
            raise RefusedError(MALFORMED)
        if self.parser.should_upgrade():
            return
        self._meter.headers_end()
        super().on_headers_complete()
        self._answering.append(self.cycle)
        if self.place is not None:
            self.place.work()
        self._stop_reading_timer()

    def on_chunk_header(self) -> None:
        """A chunk of the body begins; the parser calls this where there is such a method."""
        self._meter.chunk()

    def on_body(self, body: bytes) -> None:
        """A part of the body, refused before it is kept."""
        self._meter.body(len(body))
        if self.cycle.response_complete:
            return  # answered before it was whole; the rest is dropped
        if not self._gate.hold_body(len(body)):
            raise RefusedError(TOO_MANY_BODIES)
        self._held_bytes += len(body)
        super().on_body(body)
        self._is_excused |= self.flow.read_paused

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        self._meter.end()
        self._stop_reading_timer()
        self._release_body()
        super().on_message_complete()
        self._wait_if_idle()

    def _release_body(self) -> None:
        self._gate.release_body(self._held_bytes)
        self._held_bytes = 0

    # -- what leaves -----------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the response to reach the client."""
        self._answering.popleft()
        super().on_response_complete()
        self._wait_if_idle()
        self._watch_end()

    def _wait_if_idle(self) -> None:
        if self.place is not None and not self._answering and not self._meter.has_headers:
            self.place.wait(self.loop.time())

    def pause_writing(self) -> None:
        """The application's ``send`` waits from now on."""
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    # -- refusing --------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        """Answer instead of the application, where that is still possible, and close."""
        self._is_refused = True
        self._stop_reading_timer()
        self._release_body()
        receiving = self.cycle if self._meter.has_headers else None
        is_answered = receiving is not None and receiving.response_complete
        if any(cycle.response_started or cycle is not receiving for cycle in self._answering):
            self.transport.abort()  # in the middle of an answer there is no place for another
            return
        self._disconnect()
        if not is_answered:
            request_id = new_request_id()
            self.transport.write(refusal.response(request_id, self.server_state.default_headers))
            if receiving is None:
                self._access_log.refused(refusal.status, request_id)
            else:  # its line is written once the application has let go of it
                receiving.scope["state"][REFUSED] = (refusal.status, request_id)
        self._linger()

    def _disconnect(self) -> None:
        for cycle in self._answering:
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False  # nothing may be written any more
            cycle.message_event.set()
        self._answering.clear()

    def _linger(self) -> None:
        """Close so that a client that still sends can read why: a plain close would reset it."""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()  # TLS has a goodbye of its own, and reads until it is answered
        self._read_timer = self.loop.call_later(self._limits.linger_s, self.transport.abort)

    # -- clients that are slow -------------------------------------------------------------------

    def _await_headers(self) -> None:
        timeout_s = self._limits.headers_timeout_s
        self._read_timer = self.loop.call_later(timeout_s, self._end_headers)

    def _end_headers(self) -> None:
        self._read_timer = None
        if self._meter.has_begun:
            self._refuse(HEADERS_TOO_SLOW)
        else:
            self.transport.close()
            self._watch_end()

    def _await_rest(self) -> None:
        """Set a deadline for what is not whole yet, or for the next request where nothing runs."""
        if self._meter.has_headers:
            self._seen_body_bytes = 0
            self._body_windows = 0
            self._is_excused = self.flow.read_paused
            self._read_timer = self.loop.call_later(self._limits.body_window_s, self._check_body)
        elif not self._answering:
            self._await_headers()

    def _check_body(self) -> None:
        """Judge a window, unless the application kept the client waiting in it."""
        limits = self._limits
        brought = self._meter.body_bytes - self._seen_body_bytes
        self._seen_body_bytes = self._meter.body_bytes
        waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if not (waits or self._is_excused):
            self._body_windows += 1
            is_late = self._body_windows * limits.body_window_s >= limits.body_timeout_s
            if is_late or brought < limits.min_rate_bytes_per_s * limits.body_window_s:
                self._refuse(BODY_TOO_SLOW)
                return
        self._is_excused = waits
        self._read_timer = self.loop.call_later(limits.body_window_s, self._check_body)

    def _watch_writes(self) -> None:
        """Drop the connection where nothing leaves; whatever leaves is what was there already."""
        if self._write_timer is None:
            self._unsent_bytes = self.transport.get_write_buffer_size()
            window_s = self._limits.write_window_s
            self._write_timer = self.loop.call_later(window_s, self._check_writes)

    def _watch_end(self) -> None:
        """See to it that a closing connection ends."""
        if self.transport.is_closing():
            self._watch_writes()

    def _check_writes(self) -> None:
        self._write_timer = None
        sent = self._unsent_bytes - self.transport.get_write_buffer_size()
        if sent < self._limits.min_rate_bytes_per_s * self._limits.write_window_s:
            self.transport.abort()
        else:
            self._watch_writes()

    def _stop_reading_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _refusal_of(error: httptools.HttpParserError) -> Refusal:
    """Why the parser stopped. Raises an error that is no client's fault."""
    cause = error.__context__
    if isinstance(cause, RefusedError):
        return cause.refusal
    is_theirs = isinstance(cause, httptools.HttpParserError | UnicodeError)
    if isinstance(error, httptools.HttpParserCallbackError) and not is_theirs:
        raise error
    return MALFORMED
