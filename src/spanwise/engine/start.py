"""The slow way to a running engine, beside the loop that already answers."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from spanwise.engine.config import EngineConfig
from spanwise.engine.language_launch import Started, launch
from spanwise.engine.messages import Located, Phase, Running, ToFront
from spanwise.engine.sampling_defaults import read_defaults
from spanwise.errors import SpanwiseError
from spanwise.model.folder import read_config, read_generation_config, resolve_model
from spanwise.worker.remote_supervisor import RemoteSupervisor


class Start:
    """Finds the model and launches it on a thread; its callbacks run where ``hear`` is called.

    ``tell(message)`` how far it has come, then ``begin(started, message)`` or ``fail(error)``.
    """

    def __init__(
        self,
        config: EngineConfig,
        supervisor: RemoteSupervisor,
        tell: Callable[[ToFront], None],
        begin: Callable[[Started, Running], None],
        fail: Callable[[SpanwiseError], None],
    ) -> None:
        self._config, self._supervisor = config, supervisor
        self._tell, self._begin, self._fail = tell, begin, fail
        self._waiting: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        threading.Thread(target=self._run, name="start", daemon=True).start()

    def fileno(self) -> int:
        """For selectors: readable when ``hear`` has something to do."""
        return self._wake_read

    def hear(self) -> None:
        """Call back what has come."""
        os.read(self._wake_read, 4096)
        while self._waiting:
            self._waiting.popleft()()

    def _run(self) -> None:
        try:
            self._progress("looking for the model")
            folder = resolve_model(self._config.model)
            self._soon(partial(self._tell, Located(str(folder))))
            defaults = read_defaults(read_generation_config(folder), read_config(folder))
            started = launch(self._config, folder, self._progress, self._supervisor)
            running = Running(started.plan, started.facts.vocab_size, defaults)
            self._soon(partial(self._begin, started, running))
        except SpanwiseError as error:
            self._soon(partial(self._fail, error))

    def _progress(self, line: str) -> None:
        self._soon(partial(self._tell, Phase(line)))

    def _soon(self, action: Callable[[], None]) -> None:
        self._waiting.append(action)
        os.write(self._wake_write, b"\0")
