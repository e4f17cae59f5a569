"""A server on a port of this machine, in a thread of this process."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import uvloop
from tests.server.fakes import FakeEngine

from spanwise.server.app import create_app
from spanwise.server.options import ServerOptions
from spanwise.server.transport.server import HttpServer

PATIENCE_S = 60.0  # the machine may be busy


@dataclass(frozen=True)
class Running:
    """The server: ``engine`` belongs to its loop; change it through ``on_loop`` while it works."""

    engine: FakeEngine
    url: str
    loop: asyncio.AbstractEventLoop

    def on_loop(self, work: Callable[[], Any]) -> Any:
        """Do something where the server runs."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)

    def client(self, **options: Any) -> httpx2.Client:
        """A plain client."""
        return httpx2.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S
        )


@contextmanager
def running(options: ServerOptions | None = None) -> Iterator[Running]:
    """Serve until the block ends."""
    engine = FakeEngine()
    app = create_app(engine, options or ServerOptions())
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    listening.setblocking(False)
    server: list[HttpServer] = []
    loop = uvloop.new_event_loop()
    started = threading.Event()

    async def serve() -> None:
        server.append(HttpServer(app, listening, shutdown_timeout_s=PATIENCE_S))
        loop.call_soon(started.set)
        await server[0].serve()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    # What else this process holds is no part of the server, and would slow its answers down.
    gc.collect()
    gc.freeze()
    thread.start()
    started.wait(PATIENCE_S)
    try:
        yield Running(engine, f"http://{host}:{port}", loop)
    finally:
        loop.call_soon_threadsafe(server[0].stop)
        thread.join(PATIENCE_S)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gc.unfreeze()
