"""One request to an application, by hand: what the client does is up to the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

Application = Callable[..., Coroutine[Any, Any, None]]


class Call:
    """A request under way: ``sent`` is what the application has said so far.

    The client reads everything at once while ``reads`` is set, and otherwise nothing.
    """

    def __init__(self, application: Application, path: str, body: Any, **headers: str) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.news = asyncio.Event()
        self._gone = asyncio.Event()
        self._bodies = [json.dumps(body).encode()]
        given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 5),
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()],
        }
        self.task = asyncio.create_task(application(scope, self._receive, self._send))

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def is_complete(self) -> bool:
        if not self.sent or self.sent[-1]["type"] != "http.response.body":
            return False
        return not self.sent[-1].get("more_body", False)

    def leave(self) -> None:
        """The client closes the connection."""
        self._gone.set()

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait until the application has said enough."""
        while not wanted():
            self.news.clear()
            await self.news.wait()

    async def _receive(self) -> dict[str, Any]:
        if self._bodies:
            return {"type": "http.request", "body": self._bodies.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
        self.news.set()
