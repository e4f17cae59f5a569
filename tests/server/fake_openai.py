"""A small server that speaks OpenAI's protocol on loopback, and misbehaves on request.

What it does with a request stands in the request itself: its ``user`` field names a behaviour, or
the last message of a chat does.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TOKEN_S = 0.002
_LONG = 50
_ENDLESS = 1_000_000


class FakeOpenAI:
    """Streams ``max_tokens`` words an answer, one each 2 ms, to completions and chats.

    ``bodies``: the requests it got, in order. ``peak``: how many it had at once, at most.
    ``is_streaming_long``: set where an answer has come past 50 tokens, after others.
    """

    def __init__(self, models: tuple[str, ...] = ("fake",), vocab_size: int | None = 1000) -> None:
        self.models, self.vocab_size = models, vocab_size
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.peak = 0
        self.num_connections = 0
        self.num_broken_off = 0
        self.is_streaming_long = threading.Event()
        self.url = ""
        self._num_now = 0

    @classmethod
    def at(cls, url: str) -> FakeOpenAI:
        """One that does not run."""
        server = cls()
        server.url = url
        return server

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, path, _ = head.split(" ", 2)
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        self.keys.add(headers.get("authorization", ""))
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            self._get(path, writer)
            return
        self.bodies.append(json.loads(body))
        self._num_now += 1
        self.peak = max(self.peak, self._num_now)
        try:
            await self._behave(path, self.bodies[-1], writer)
        except ConnectionError:
            self.num_broken_off += 1
            raise
        finally:
            self._num_now -= 1

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            whole(writer, 200, {"data": [{"id": name} for name in self.models]})
        elif path == "/tokenizer_info" and self.vocab_size is not None:
            whole(writer, 200, {"vocab_size": self.vocab_size})
        else:
            whole(writer, 404, {"error": {"message": f"no route {path}"}})

    async def _behave(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        messages = body.get("messages") or [{"content": ""}]
        match body.get("user", messages[-1]["content"]):
            case "busy":
                whole(
                    writer, 429, {"error": {"message": "too many\nrequests"}}, "Retry-After: 7\r\n"
                )
            case "rude":
                writer.transport.abort()
            case "silent":
                await reader_gone(writer)
            case behaviour:
                is_chat = path == "/v1/chat/completions"
                await self._stream(is_chat, body, behaviour, writer)

    async def _stream(
        self, is_chat: bool, body: dict[str, Any], behaviour: str, writer: asyncio.StreamWriter
    ) -> None:
        num_tokens = _ENDLESS if behaviour == "endless" else body.get("max_tokens", 5)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        send = Sender(writer, behaviour)
        if is_chat:
            send.event(chunk({"delta": {"role": "assistant", "content": ""}}))
        for position in range(num_tokens):
            await asyncio.sleep(_TOKEN_S)
            if behaviour == "cut" and position == 2:
                writer.transport.abort()
                return
            if behaviour == "error" and position == 2:
                send.event({"error": {"message": "the engine died"}})
                break
            text = f"word{position} "
            send.event(chunk({"delta": {"content": text}} if is_chat else {"text": text}))
            await writer.drain()
            if position == _LONG and len(self.bodies) > 2:
                self.is_streaming_long.set()
        else:
            send.event(chunk({"delta": {}} if is_chat else {"text": ""}, "length"))
            if behaviour != "uncounted":
                prompt = body.get("prompt") or body["messages"]
                usage = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
                send.event({"choices": [], "usage": usage})
        send.raw(b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


class Sender:
    """Writes events; as ``shredded`` byte by byte with other line ends and comments."""

    def __init__(self, writer: asyncio.StreamWriter, behaviour: str) -> None:
        self._writer, self._is_shredded = writer, behaviour == "shredded"

    def event(self, record: dict[str, Any]) -> None:
        self.raw(b"data: " + json.dumps(record).encode() + b"\n\n")

    def raw(self, event: bytes) -> None:
        if self._is_shredded:
            event = b": still here\r\n\r\n" + event.replace(b"\n", b"\r\n")
        for piece in (
            [event[i : i + 1] for i in range(len(event))] if self._is_shredded else [event]
        ):
            self._writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def chunk(choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, **choice, "finish_reason": finish_reason}], "usage": None}


def whole(
    writer: asyncio.StreamWriter, status: int, record: dict[str, Any], more_headers: str = ""
) -> None:
    body = json.dumps(record).encode()
    head = f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n{more_headers}"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


async def reader_gone(writer: asyncio.StreamWriter) -> None:
    while not writer.transport.is_closing():
        await asyncio.sleep(0.01)
    raise ConnectionResetError


@contextmanager
def serving(server: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Run a server in a thread of its own; it sets the server's ``url``."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.connected, "127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="fake server")
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(listening: asyncio.Server) -> None:
    """Close the door, then break off whoever is still inside."""
    listening.close()
    inside = asyncio.all_tasks() - {asyncio.current_task()}
    for task in inside:
        task.cancel()
    await asyncio.gather(*inside, return_exceptions=True)
