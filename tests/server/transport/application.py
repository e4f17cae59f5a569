"""The server under test, run as a program: a small application behind `HttpServer`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import socket
import sys
from contextlib import suppress
from typing import Any

import msgspec

from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.server import HttpServer
from spanwise.server.transport.tls import tls_context

KIB = 2**10


class App:
    """Streams, echoes, and misbehaves when asked to."""

    def __init__(self) -> None:
        self.num_open = 0
        self.num_sent_bytes = 0
        self.interrupted = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError("there is nothing to prepare")
        self.num_open += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.num_open -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        numbers = dict(re.findall(r"(\w+)=(\d+)", scope["query_string"].decode()))
        match scope["path"]:
            case "/stream":
                await self._stream(int(numbers["n"]), int(numbers["every_ms"]), receive, send)
            case "/flood":
                await self._flood(receive, send)
            case "/echo" | "/echo/":
                await self._echo(receive, send, scope["headers"])
            case "/later":
                await asyncio.sleep(int(numbers["ms"]) / 1000)
                await self._echo(receive, send, [])
            case "/wait":
                await _start(send)
                await _until_gone(receive)
            case "/early":
                await _reply(send, 401, {})
            case "/large":
                await _reply(send, 200, "x" * int(numbers["n"]))
            case "/named":
                await _reply(send, 200, {}, (b"X-Request-Id", b"mine"))
            case "/stats":
                stats = {"open": self.num_open - 1, "sent_bytes": self.num_sent_bytes}
                await _reply(send, 200, stats)
            case "/raises":
                raise RuntimeError("planted")
            case "/silent":
                return
            case _:
                await _reply(send, 404, {})

    async def _echo(self, receive: Any, send: Any, headers: Any) -> None:
        body = await _body(receive)
        if body is None:
            return
        names = [name.decode() for name, _ in headers]
        digest = hashlib.sha256(body).hexdigest()
        await _reply(send, 200, {"n": len(body), "sha256": digest, "headers": names})

    async def _stream(self, num: int, every_ms: int, receive: Any, send: Any) -> None:
        """Events at a steady pace, or an error event once interrupted."""
        await _start(send)
        gone = asyncio.create_task(_until_gone(receive))
        for index in range(num):
            if gone.done():
                return
            if self.interrupted.is_set():
                await send({"type": "http.response.body", "body": b"data: interrupted\n\n"})
                break
            await send({"type": "http.response.body", "body": event(index), "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self.interrupted.wait(), every_ms / 1000)
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        gone.cancel()

    async def _flood(self, receive: Any, send: Any) -> None:
        """As much as the client takes."""
        await _start(send)
        gone = asyncio.create_task(_until_gone(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 4 * KIB, "more_body": True})
            self.num_sent_bytes += 4 * KIB
            await asyncio.sleep(0)


def event(index: int) -> bytes:
    return b"data: %d %s\n\n" % (index, hashlib.sha256(b"%d" % index).hexdigest().encode())


async def _start(send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _body(receive: Any) -> bytes | None:
    """The whole body, or None where the client has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reply(send: Any, status: int, value: Any, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(value).encode()
    length = (b"content-length", b"%d" % len(body))
    start = {"type": "http.response.start", "status": status, "headers": [length, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def main(listening_fd: int, limits: str, options: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    chosen = json.loads(options)
    app = App()
    certificate = chosen.get("certfile")
    HttpServer(
        app,
        socket.socket(fileno=listening_fd),
        limits=msgspec.json.decode(limits, type=TransportLimits),
        tls=tls_context(certificate) if certificate else None,
        shutdown_timeout_s=chosen.get("shutdown_timeout_s", 30.0),
        interrupt=app.interrupted.set,
        access_logger=logging.getLogger("access"),
    ).run()
    assert app.num_open == 0


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
