"""Measures a request while it is parsed, so that too much is refused before it is kept."""

from __future__ import annotations

from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.refusal import (
    BODY_TOO_LARGE,
    HEADER_TOO_LARGE,
    HEADERS_TOO_LARGE,
    TOO_MANY_CHUNKS,
    TOO_MANY_HEADERS,
    URL_TOO_LONG,
    RefusedError,
)

_HEADER_FRAMING_BYTES = 4  # the colon, a space, the line's end


class RequestMeter:
    """Counts one request after the other; every method may raise RefusedError.

    The parser collects a header, a trailer or a chunk's extension without saying so. What was
    fed since it last reported something is therefore counted too, and is as bounded as headers.
    """

    def __init__(self, limits: TransportLimits) -> None:
        self._limits = limits
        self._unreported_bytes = 0
        self._announced_bytes = 0
        self._start()

    def _start(self) -> None:
        self.has_begun = False
        self.has_headers = False
        self.body_bytes = 0
        self._url_bytes = 0
        self._num_headers = 0
        self._headers_bytes = 0
        self._num_chunks = 0

    @property
    def room_bytes(self) -> int:
        """How much may be fed before `check` has to be asked; at least 1."""
        return self._limits.max_headers_bytes - self._unreported_bytes + 1

    def feed(self, num_bytes: int) -> None:
        """So much is about to be parsed."""
        self._unreported_bytes += num_bytes

    def check(self) -> None:
        """It has been parsed."""
        if self._unreported_bytes > self._limits.max_headers_bytes:
            raise RefusedError(HEADERS_TOO_LARGE)

    def begin(self) -> None:
        """A request begins."""
        self._start()
        self.has_begun = True
        self._announced_bytes = 0

    def url(self, num_bytes: int) -> None:
        """A part of the URL."""
        self._url_bytes += num_bytes
        if self._url_bytes > self._limits.max_url_bytes:
            raise RefusedError(URL_TOO_LONG)

    def header(self, name: bytes, value: bytes) -> None:
        """A whole header."""
        limits = self._limits
        num_bytes = len(name) + len(value) + _HEADER_FRAMING_BYTES
        self._num_headers += 1
        self._headers_bytes += num_bytes
        if num_bytes > limits.max_header_bytes:
            raise RefusedError(HEADER_TOO_LARGE)
        if self._num_headers > limits.max_num_headers:
            raise RefusedError(TOO_MANY_HEADERS)
        if self._headers_bytes > limits.max_headers_bytes:
            raise RefusedError(HEADERS_TOO_LARGE)
        if name.lower() == b"content-length":
            # The parser has seen to it that these are digits; there may be many zeros.
            digits = value.strip().lstrip(b"0")[:20]
            self._announced_bytes = int(digits or b"0")

    def headers_end(self) -> None:
        """All headers are there; they are not taken where a body is announced as too large."""
        if self._announced_bytes > self._limits.max_body_bytes:
            raise RefusedError(BODY_TOO_LARGE)
        self.has_headers = True
        self._unreported_bytes = 0

    def chunk(self) -> None:
        """A chunk of the body begins."""
        self._unreported_bytes = 0
        self._num_chunks += 1
        if self._num_chunks > self._limits.max_num_chunks:
            raise RefusedError(TOO_MANY_CHUNKS)

    def body(self, num_bytes: int) -> None:
        """A part of the body."""
        self._unreported_bytes = 0
        self.body_bytes += num_bytes
        if self.body_bytes > self._limits.max_body_bytes:
            raise RefusedError(BODY_TOO_LARGE)

    def end(self) -> None:
        """The request is whole."""
        self._unreported_bytes = 0
        self._start()
