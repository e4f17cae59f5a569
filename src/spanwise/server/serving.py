"""The process a server is started as: it owns all others, and does nothing else."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from spanwise.engine.launch import EnginePlan
from spanwise.engine.messages import EngineFailed, Phase, Running, ToFront
from spanwise.engine.service import EngineService
from spanwise.errors import EngineError, InputError, SpanwiseError
from spanwise.server.config import ServingConfig
from spanwise.server.transport.tls import tls_context
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.failure import error_of
from spanwise.worker.python_process import PythonProcess

_HTTP_MODULE = "spanwise.server.process"
_MAX_RESTARTS, _RESTART_WINDOW_S = 5, 60.0
# Beyond the time requests have to finish: for streams that are interrupted to say so.
_END_GRACE_S = 10.0


def listen(host: str, port: int) -> socket.socket:
    """Open the server's port. Raises InputError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        why = error.strerror or error
        raise InputError(f"cannot listen on {host}:{port}: {why}; give another --port") from error
    return listening


class Serving:
    """Starts everything, restarts HTTP processes that die, and ends everything.

    ``progress(line)`` is called as the start goes on, ``ready(plan)`` once requests are taken,
    ``warn(line)`` for what an operator should know.
    """

    def __init__(
        self,
        config: ServingConfig,
        progress: Callable[[str], None],
        ready: Callable[[EnginePlan], None],
        warn: Callable[[str], None],
    ) -> None:
        """Open the port and start the processes. Raises InputError."""
        self._config, self._progress, self._ready, self._warn = config, progress, ready, warn
        if config.http.certfile is not None:
            # Every HTTP process reads it; what is wrong with it is said here, once.
            tls_context(config.http.certfile, config.http.keyfile)
        self._selector = selectors.DefaultSelector()
        self._listening = listen(config.host, config.port)
        self._restarts: deque[float] = deque()
        self._http: list[PythonProcess] = []
        self._error: SpanwiseError | None = None
        self._is_ending = False
        self._num_signals = 0
        # Not on a command line, which every user of this machine may read.
        self._http_config_fd = os.memfd_create("spanwise-http-config", os.MFD_CLOEXEC)
        os.write(self._http_config_fd, msgspec.json.encode(config.http))
        self._service = EngineService(config.service)
        try:
            self._status: Channel[ToFront] = Channel(self._service.connect(), ToFront)
            for _ in range(config.http_workers):
                self._start_http()
        except BaseException:
            self._close()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that clients connect to."""
        host, port = self._listening.getsockname()[:2]
        return str(host), int(port)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises what the engine failed with."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wake-up says it
        watched = (
            (wake_read, partial(self._hear_signals, wake_read)),
            (self._status, self._hear_status),
            (self._service.engine.pidfd, self._lose_engine),
        )
        for source, action in watched:
            self._selector.register(source, selectors.EVENT_READ, action)
        try:
            while not self._is_ending:
                for key, _ in self._selector.select():
                    key.data()
        finally:
            self._end(wake_read)
            signal.set_wakeup_fd(-1)
            os.close(wake_read)
            os.close(wake_write)
        if self._error is not None:
            raise self._error

    # -- events ----------------------------------------------------------------------------------

    def _hear_signals(self, wake_read: int) -> None:
        self._num_signals += len(os.read(wake_read, 4096))
        self._is_ending = True

    def _hear_status(self) -> None:
        try:
            for message, _ in self._status.arrived():
                match message:
                    case Phase(text):
                        self._progress(text)
                    case Running():
                        self._ready(message.plan)
                    case EngineFailed():
                        self._fail(error_of(message.error))
        except ChannelClosed:
            self._lose_engine()

    def _lose_engine(self) -> None:
        self._fail(EngineError("the engine process is gone"))

    def _fail(self, error: SpanwiseError) -> None:
        self._error = self._error or error
        self._is_ending = True

    # -- HTTP processes --------------------------------------------------------------------------

    def _start_http(self) -> None:
        with self._service.connect() as front:
            fds = (self._listening.fileno(), front.fileno(), self._http_config_fd)
            process = PythonProcess(_HTTP_MODULE, fds)
        self._http.append(process)
        lose = partial(self._lose_http, process)
        self._selector.register(process.pidfd, selectors.EVENT_READ, lose)

    def _lose_http(self, process: PythonProcess) -> None:
        """Start another in its place, unless that has been tried too often."""
        self._selector.unregister(process.pidfd)
        self._http.remove(process)
        code = process.end(0)
        now_s = time.monotonic()
        while self._restarts and self._restarts[0] < now_s - _RESTART_WINDOW_S:
            self._restarts.popleft()
        self._restarts.append(now_s)
        if len(self._restarts) > _MAX_RESTARTS:
            self._fail(EngineError(f"HTTP processes keep ending, the last with code {code}"))
            return
        self._warn(f"an HTTP process ended with code {code}; starting another")
        self._start_http()

    # -- the end ---------------------------------------------------------------------------------

    def _end(self, wake_read: int) -> None:
        """Let requests finish, as long as they may; a second signal shortens that."""
        self._listening.close()
        for _ in range(max(1, self._num_signals)):
            for process in self._http:
                process.signal(signal.SIGTERM)
        deadline_s = time.monotonic() + self._config.http.shutdown_timeout_s + _END_GRACE_S
        with selectors.DefaultSelector() as selector:
            selector.register(wake_read, selectors.EVENT_READ)
            alive = {process.pidfd: process for process in self._http}
            for pidfd in alive:
                selector.register(pidfd, selectors.EVENT_READ)
            while alive and (left_s := deadline_s - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    if key.fd == wake_read:
                        os.read(wake_read, 4096)
                        for process in alive.values():
                            process.signal(signal.SIGTERM)
                    else:
                        selector.unregister(key.fd)
                        del alive[key.fd]
        self._close()

    def _close(self) -> None:
        for process in self._http:
            process.end(0)
        self._http.clear()
        self._status.close()
        self._service.close()
        self._selector.close()
        self._listening.close()
        os.close(self._http_config_fd)
