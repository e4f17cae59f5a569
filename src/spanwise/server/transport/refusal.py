"""Answers the transport gives itself, before an application could."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from http import HTTPStatus

import msgspec


class Refusal(msgspec.Struct, frozen=True):
    """An HTTP error in the form every route answers with."""

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"

    def body(self) -> bytes:
        """The JSON of the error."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self, body: bytes, request_id: str) -> list[tuple[bytes, bytes]]:
        """What goes with that body; the connection is to close after it."""
        retry = [(b"retry-after", b"1")] if self.status == HTTPStatus.SERVICE_UNAVAILABLE else []
        return [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
            *retry,
        ]

    def response(self, request_id: str, more_headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
        """The whole response, as it goes over the wire."""
        body = self.body()
        status = HTTPStatus(self.status)
        head = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
        headers = (*more_headers, *self.headers(body, request_id))
        head += [b"%b: %b" % header for header in headers]
        return b"\r\n".join([*head, b"", body])


class RefusedError(Exception):
    """Ends the parsing of a request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def new_request_id() -> str:
    """A name for a request that nobody else gives."""
    return f"req_{uuid.uuid4().hex}"


MALFORMED = Refusal(400, "The request is not valid HTTP/1.1.", "malformed_request")
HEADERS_TOO_SLOW = Refusal(
    408, "The headers of the request did not arrive in time.", "request_timeout"
)
BODY_TOO_SLOW = Refusal(408, "The body of the request did not arrive in time.", "request_timeout")
BODY_TOO_LARGE = Refusal(
    413, "The body of the request is larger than this server takes.", "body_too_large"
)
TOO_MANY_CHUNKS = Refusal(
    413, "The body of the request comes in too many chunks.", "too_many_chunks"
)
URL_TOO_LONG = Refusal(414, "The URL of the request is too long.", "url_too_long")
TOO_MANY_HEADERS = Refusal(431, "The request has too many headers.", "too_many_headers")
HEADER_TOO_LARGE = Refusal(431, "A header of the request is too large.", "header_too_large")
HEADERS_TOO_LARGE = Refusal(
    431, "The headers of the request are too large together.", "headers_too_large"
)
INTERNAL = Refusal(500, "The server made a mistake.", "internal_error", "server_error")
TOO_MANY_CONNECTIONS = Refusal(
    503,
    "Too many connections are open; try again soon.",
    "too_many_connections",
    "overloaded_error",
)
TOO_MANY_BODIES = Refusal(
    503, "Too many large requests are coming in; try again soon.", "too_many_bodies",
    "overloaded_error",
)  # fmt: skip
SHUTTING_DOWN = Refusal(
    503, "The server is shutting down; try again soon.", "shutting_down", "overloaded_error"
)
