"""An engine as a service: its processes, and connections to it."""

from __future__ import annotations

import os
import socket
import threading

import msgspec

from spanwise.engine.config import ServiceConfig
from spanwise.engine.messages import AddFront
from spanwise.errors import EngineError
from spanwise.worker.calls import Call
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.python_process import PythonProcess
from spanwise.worker.supervisor import Supervisor
from spanwise.worker.supervisor_service import SupervisorService

# Nothing that is still under way is worth waiting for: requests have had their time before.
_CLOSE_TIMEOUT_S = 0.5


class EngineService:
    """The supervisor and the engine process below it; this process is the supervisor.

    The model loads while this goes on; who connects is told how far it has come.
    """

    def __init__(self, config: ServiceConfig) -> None:
        """Start the processes."""
        self._supervisor = Supervisor()
        ours, theirs = socket.socketpair()
        calls, engine_calls = socket.socketpair()
        encoded = msgspec.json.encode(config).decode()
        # Outlives the engine process, whatever becomes of it.
        self._journal_fd = os.memfd_create("spanwise-journal", os.MFD_CLOEXEC)
        with theirs, engine_calls:
            fds = (theirs.fileno(), engine_calls.fileno(), self._journal_fd)
            self.engine = PythonProcess("spanwise.engine.process", fds, [encoded])
        self._owner: Channel[AddFront] = Channel(ours, AddFront)
        service = SupervisorService(self._supervisor, Channel(calls, Call))
        # A thread of its own: loading takes long, and this process has other things to do.
        self._serving = threading.Thread(target=service.serve, name="supervisor", daemon=True)
        self._serving.start()
        self._is_closed = False

    def connect(self) -> socket.socket:
        """Give a new front's end of its channel. Raises EngineError where the engine is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._owner.send(AddFront(), [theirs.fileno()])
            except ChannelClosed as error:
                ours.close()
                raise EngineError("the engine process is gone") from error
        return ours

    def pids(self) -> list[int]:
        """Every process of the service that is alive, but this one."""
        engine = [self.engine.pid] if self.engine.is_alive() else []
        return engine + self._supervisor.pids()

    def close(self) -> None:
        """End every process. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._owner.finish()
        self.engine.end(_CLOSE_TIMEOUT_S)
        self._owner.close()
        # The engine's end has ended its calls too, and with them the thread, once a load is done.
        self._serving.join(_CLOSE_TIMEOUT_S)
        self._supervisor.shutdown(_CLOSE_TIMEOUT_S)
        os.close(self._journal_fd)
