"""The HTTP server of one process: from a bound socket to its orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate

import uvicorn
import uvloop
from uvicorn.server import ServerState

from spanwise.errors import SpanwiseError
from spanwise.server.transport.access_log import AccessLog
from spanwise.server.transport.envelope import Application, Envelope
from spanwise.server.transport.gate import Gate
from spanwise.server.transport.limits import TransportLimits
from spanwise.server.transport.listener import Listener
from spanwise.server.transport.protocol import LimitedHttpProtocol

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# For streams to say that they were interrupted, and for that to be read.
_GRACE_S = 5.0
# For what the application does once its client is gone.
_CANCEL_S = 2.0
_DATE_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


class HttpServer:
    """Serves an ASGI application on a bound socket, which it owns from then on.

    It ends in stages, at SIGTERM, SIGINT or `stop`: nothing more is accepted and what runs may
    finish within ``shutdown_timeout_s``; then ``interrupt`` is called, on the event loop, for the
    application to end its streams with an error event; whatever is left after a short grace is
    cut. Being asked again goes on to the next stage at once.
    """

    def __init__(
        self,
        application: Application,
        listening: socket.socket,
        *,
        limits: TransportLimits | None = None,
        tls: ssl.SSLContext | None = None,
        shutdown_timeout_s: float = 30.0,
        interrupt: Callable[[], None] | None = None,
        access_logger: logging.Logger | None = None,
    ) -> None:
        self._application = application
        self._socket = listening
        self._limits = limits or TransportLimits()
        self._tls = tls
        self._shutdown_timeout_s = shutdown_timeout_s
        self._interrupt = interrupt
        self._access_log = AccessLog(access_logger)
        self._gate = Gate(self._limits)
        self._state = ServerState()
        # One for each stage: finish, interrupt, cut.
        self._stages = [asyncio.Event() for _ in range(3)]

    def run(self) -> None:
        """Serve on an event loop of its own until the end."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self.serve())

    def stop(self) -> None:
        """Begin the next stage of the end; to be called on the event loop."""
        stage = next((each for each in self._stages if not each.is_set()), None)
        if stage is not None:
            stage.set()

    async def serve(self) -> None:
        """Serve until the end. Raises SpanwiseError where the application does not start.

        On the main thread, SIGTERM and SIGINT are handled meanwhile.
        """
        config = self._config()
        lifespan = config.lifespan_class(config)
        with self._signals():
            await lifespan.startup()
            if lifespan.should_exit:
                self._socket.close()
                raise SpanwiseError("the HTTP application could not start; its log says why")
            await self._serve(config, lifespan.state)
            await lifespan.shutdown()

    def _config(self) -> uvicorn.Config:
        buffer_bytes = self._limits.write_buffer_bytes
        config = uvicorn.Config(
            Envelope(self._application, buffer_bytes, self._access_log),
            http=LimitedHttpProtocol,
            ws="none",
            interface="asgi3",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        config.load()
        return config

    async def _serve(self, config: uvicorn.Config, app_state: dict[str, object]) -> None:
        def protocol() -> LimitedHttpProtocol:
            return LimitedHttpProtocol(
                config, self._state, app_state,
                limits=self._limits, gate=self._gate, access_log=self._access_log,
            )  # fmt: skip

        listener = Listener(
            self._socket, self._tls, self._limits, self._gate, self._access_log, protocol
        )
        dates = asyncio.create_task(self._keep_date())
        listener.open()
        try:
            await self._stages[0].wait()
        finally:
            listener.close()
        await self._end()
        dates.cancel()

    async def _keep_date(self) -> None:
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(_DATE_EVERY_S)

    async def _end(self) -> None:
        self._gate.is_closed = True
        for connection in list(self._state.connections):
            connection.shutdown()
        if await self._has_finished(self._shutdown_timeout_s, self._stages[1]):
            return
        _logger.warning("interrupting %d requests at the end", len(self._state.tasks))
        if self._interrupt is not None:
            self._interrupt()
        if await self._has_finished(_GRACE_S, self._stages[2]):
            return
        _logger.warning("cutting %d connections at the end", len(self._state.connections))
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._gate.wait_until_empty()
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)

    async def _has_finished(self, timeout_s: float, hurry: asyncio.Event) -> bool:
        """Wait for all connections and requests to end; False where it takes too long."""
        finished = asyncio.create_task(self._finish())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait(
            {finished, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        has_finished = finished.done()
        finished.cancel()
        hurried.cancel()
        return has_finished

    async def _finish(self) -> None:
        await self._gate.wait_until_empty()
        while self._state.tasks:
            await asyncio.wait(self._state.tasks)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        for number in handled:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
