"""One HTTP request, as the routes see it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine
from hashlib import sha256
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request

from spanwise.errors import SpanwiseError
from spanwise.server.answers import cancelled, wait_until_gone
from spanwise.server.errors import ApiError, bad_request
from spanwise.server.generation import new_name
from spanwise.server.options import ServerOptions
from spanwise.server.protocol.decode import decode
from spanwise.server.protocol.strict import Strict
from spanwise.server.transport.notes import NOTES, REQUEST_ID, RequestNotes
from spanwise.types.resume import Resume

Body = TypeVar("Body", bound=Strict)
Result = TypeVar("Result")

TENANT = "spanwise.tenant"

_KEY_HEADER = "Idempotency-Key"
_GOOD_KEY = re.compile(r"[ -~]{1,255}")


class ClientGoneError(SpanwiseError):
    """The client has left; nobody waits for an answer."""


class Exchange:
    """A request: who sends it, what it says, and whether they still wait.

    ``resume``, once it is read: by what they may ask for its answer again.
    """

    def __init__(self, request: Request, options: ServerOptions) -> None:
        self._request, self._max_body_bytes = request, options.max_body_bytes
        self._keeps_answers = options.keeps_answers
        self.resume: Resume | None = None

    @property
    def request_id(self) -> str:
        """The name of the request."""
        name: str = self._request.scope[REQUEST_ID]
        return name

    @property
    def tenant(self) -> str:
        """Whose request it is; "" where there are no keys."""
        name: str = self._request.scope[TENANT]
        return name

    @property
    def may_be_known(self) -> bool:
        """Whether its answer may be there already, since it was asked for before."""
        return _KEY_HEADER in self._request.headers

    @property
    def notes(self) -> RequestNotes:
        """What the log is to say of the request."""
        notes: RequestNotes = self._request.scope.setdefault(NOTES, RequestNotes(time.monotonic()))
        return notes

    def path_parameter(self, name: str) -> str:
        """A part of the path."""
        value: str = self._request.path_params[name]
        return value

    async def read(self, model: type[Body]) -> Body:
        """The body, checked. Raises ApiError, and ClientGoneError where it does not end."""
        _check_headers(self._request.headers, self._max_body_bytes)
        key = _idempotency_key(self._request.headers)
        raw = await self._read_bytes()
        body = decode(model, raw)
        if key is not None and self._keeps_answers:
            whose = "\0".join((self.tenant, self._request.scope["path"], key))
            digests = sha256(whose.encode()).digest(), sha256(raw).digest()
            self.resume = Resume(*digests, new_name())
        return body

    async def until_done(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the work to its end where its answer may be asked for again, else ``unless_gone``."""
        return await (self.unless_gone(work) if self.resume is None else work)

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the work while the client waits for it.

        Raises ClientGoneError when the client leaves first; the work is cancelled then.
        """
        working = asyncio.create_task(work)
        gone = asyncio.create_task(wait_until_gone(self._request.receive))
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientGoneError("the client has left")
        finally:
            await cancelled(working, gone)

    async def _read_bytes(self) -> bytes:
        """All of the body; no more of it is kept than may come."""
        pieces, size = [], 0
        while True:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client left before its request had ended")
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._max_body_bytes:
                raise _too_large(self._max_body_bytes)
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)


def _idempotency_key(headers: Headers) -> str | None:
    """The key of the request, if it has one. Raises ApiError."""
    given = headers.getlist(_KEY_HEADER)
    if not given:
        return None
    if len(given) > 1 or _GOOD_KEY.fullmatch(given[0]) is None:
        raise bad_request(
            f"{_KEY_HEADER} must be 1 to 255 printable ASCII characters, and sent once",
            _KEY_HEADER,
        )
    return given[0]


def _check_headers(headers: Headers, max_body_bytes: int) -> None:
    kind, *parameters = headers.get("content-type", "").split(";")
    charsets = [each.partition("=")[2].strip(' "').lower() for each in parameters]
    if kind.strip().lower() != "application/json" or not set(charsets) <= {"utf-8", "utf8"}:
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON in UTF-8; set Content-Type to application/json",
            code="unsupported_media_type",
        )
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must not be compressed; leave Content-Encoding out",
            code="unsupported_content_encoding",
        )
    size = headers.get("content-length")
    if size is None:
        return
    if not (size.isascii() and size.isdecimal()):
        raise bad_request("Content-Length must be a number of bytes")
    if int(size[:20]) > max_body_bytes:
        raise _too_large(max_body_bytes)


def _too_large(max_body_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body is larger than {max_body_bytes} bytes; send less",
        code="body_too_large",
        headers={"connection": "close"},
    )
