"""Answers, as they go over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spanwise.errors import SpanwiseError
from spanwise.server.errors import ApiError


def json_answer(data: msgspec.Struct, status: int = HTTPStatus.OK) -> Response:
    """A whole answer."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")


def error_answer(error: ApiError) -> Response:
    """What went wrong."""
    return Response(error.body(), error.status, error.headers, "application/json")


async def wait_until_gone(receive: Receive) -> None:
    """Return when the client has left; the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and return when it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events as they come, each written at once.

    A client that reads slowly makes ``send`` wait, and that makes whoever produces the events wait.
    When the client leaves, ``abort`` is called, and the rest is not produced; with ``runs_on`` it
    is, and nobody reads it. An error after the beginning becomes the event that ``error_event``
    makes of it, and nothing comes after it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        *,
        abort: Callable[[], None],
        error_event: Callable[[SpanwiseError], bytes],
        runs_on: bool = False,
    ) -> None:
        self.status_code = HTTPStatus.OK
        self.background = None
        self._first, self._rest = first, rest
        self._abort, self._error_event, self._runs_on = abort, error_event, runs_on
        # A proxy that gathers events would undo the streaming.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    @classmethod
    async def begin(
        cls,
        events: AsyncGenerator[bytes],
        *,
        abort: Callable[[], None],
        error_event: Callable[[SpanwiseError], bytes],
        runs_on: bool = False,
    ) -> EventStream:
        """Wait for the first event: until then an error is an answer of its own."""
        try:
            first = await anext(events)
        except BaseException:
            abort()
            raise
        return cls(first, events, abort=abort, error_event=error_event, runs_on=runs_on)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            if self._runs_on:
                await self._send(send)
            else:
                await self._send_unless_gone(receive, send)
        finally:
            self._abort()

    async def _send_unless_gone(self, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_until_gone(receive))
        sending = asyncio.create_task(self._send(send))
        try:
            await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await cancelled(gone, sending)

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code}
        await send({**head, "headers": self.raw_headers})
        body = {"type": "http.response.body", "more_body": True}
        await send({**body, "body": self._first})
        last = b""
        try:
            async with aclosing(self._rest) as rest:
                async for data in rest:
                    await send({**body, "body": data})
        except SpanwiseError as error:
            last = self._error_event(error)
        await send({"type": "http.response.body", "body": last})
