"""What the transport adds around the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.notes import NOTES, REQUEST_ID, RequestNotes
from spanwise.server.transport.refusal import INTERNAL, new_request_id

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

REFUSED = "spanwise.refused"
"""Where a scope's state tells of an answer that the transport gave: its status and request id."""

_REQUEST_ID = b"x-request-id"
# nginx's number for a client that went before it was answered
_CLIENT_IS_GONE = 499


class Envelope:
    """An ASGI application around another.

    Each response has an ``x-request-id`` and is logged, with what the application writes into the
    scope's notes; ``aborted`` there says that it was begun and not sent to its end. A body larger
    than ``write_buffer_bytes`` is sent in pieces, each of which waits until the client has read
    enough. An application that ends without an answer is answered for, if there is still a client;
    what it raised goes on to the server's log.
    """

    def __init__(
        self, application: Application, write_buffer_bytes: int, access_log: AccessLog
    ) -> None:
        self._application = application
        self._write_buffer_bytes = write_buffer_bytes
        self._access_log = access_log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or do what a scope of another type asks for."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        response = _Response(receive, send, self._write_buffer_bytes)
        notes = scope[NOTES] = RequestNotes(time.monotonic())
        try:
            await self._application(scope, response.receive, response.send)
        except asyncio.CancelledError:
            return  # only the server cancels, at its end, when the connection is gone
        finally:
            if response.status and not response.is_whole:
                notes.facts["aborted"] = True
            await response.begin_at_last(scope.get(REQUEST_ID) or new_request_id())
            given = (response.status, response.request_id)
            status, request_id = scope.get("state", {}).get(REFUSED, given)
            duration_s = time.monotonic() - notes.begun_s
            self._access_log.answered(
                scope["method"], scope["path"], status, duration_s, request_id, notes.all_facts
            )


class _Response:
    """Passes on what an application hears and says."""

    def __init__(self, receive: Receive, send: Send, piece_bytes: int) -> None:
        self.status = 0
        self.request_id = ""
        self.is_whole = False
        self._receive = receive
        self._send = send
        self._piece_bytes = piece_bytes
        self._is_client_gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_client_gone |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(self._named(message))
            return
        body, size = message.get("body", b""), self._piece_bytes
        while len(body) > size:
            await self._send({**message, "body": body[:size], "more_body": True})
            body = body[size:]
        await self._send({**message, "body": body})
        self.is_whole = not message.get("more_body", False)

    async def begin_at_last(self, request_id: str) -> None:
        """Send an error where there is no response yet, and somebody to read it."""
        if not self.status and self._is_client_gone:
            self.status, self.request_id = _CLIENT_IS_GONE, request_id
        elif not self.status:
            body = INTERNAL.body()
            headers = INTERNAL.headers(body, request_id)
            await self.send(
                {"type": "http.response.start", "status": INTERNAL.status, "headers": headers}
            )
            await self.send({"type": "http.response.body", "body": body})

    def _named(self, message: Message) -> Message:
        """The start of the response, with a request id."""
        headers = list(message.get("headers", ()))
        given = next((value for name, value in headers if name.lower() == _REQUEST_ID), None)
        if given is None:
            given = new_request_id().encode()
            headers.append((_REQUEST_ID, given))
        self.status, self.request_id = message["status"], given.decode("latin-1")
        return {**message, "headers": headers}
