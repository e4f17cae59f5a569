"""The engine process: ``-m`` this module. Schedulers and control of all replicas; no device.

It ends when its owner's channel ends; its fronts may come and go.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from spanwise.engine.config import ServiceConfig
from spanwise.engine.core import EngineCore
from spanwise.engine.fronts import FrontPort, Fronts
from spanwise.engine.heartbeats import Heartbeats
from spanwise.engine.journal_log import JournalLog
from spanwise.engine.language_launch import LanguageReplica, Started
from spanwise.engine.messages import (
    AddFront,
    AskHealth,
    AskStats,
    CountRefused,
    EngineFailed,
    FromFront,
    Health,
    Running,
    Stats,
)
from spanwise.engine.requests import Requests
from spanwise.engine.start import Start
from spanwise.engine.telemetry import Telemetry
from spanwise.errors import EngineError, SpanwiseError
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.serving import CacheInfo, EngineHealth, EngineStats
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.failure import failure_of
from spanwise.worker.lifeline import hang_on
from spanwise.worker.remote_supervisor import RemoteSupervisor


@dataclass(frozen=True)
class _Running:
    """The parts of an engine that runs."""

    started: Started
    core: EngineCore[SequenceRequest]
    heartbeats: Heartbeats


class EngineServer:
    """The loop: what fronts say, what replicas bring, and a start that goes on beside it."""

    def __init__(
        self,
        config: ServiceConfig,
        owner: Channel[AddFront],
        supervisor: RemoteSupervisor,
        journal: JournalLog,
    ) -> None:
        self._config, self._owner = config, owner
        self._selector = selectors.DefaultSelector()
        self._fronts = Fronts(self._selector, self._hear, self._part)
        self._telemetry = Telemetry()
        self._requests = Requests(config, journal, self._telemetry, self._fronts.send)
        self._running: _Running | None = None
        self._start = Start(config.engine, supervisor, self._fronts.tell, self._begin, self._fail)

    def run(self) -> None:
        """Serve until the owner's channel ends."""
        self._selector.register(self._owner, selectors.EVENT_READ, self._meet)
        self._selector.register(self._start, selectors.EVENT_READ, self._start.hear)
        try:
            while True:
                self._serve_once()
        except ChannelClosed:
            return

    def _serve_once(self) -> None:
        patience_s = None
        if self._running is not None:
            self._guarded(partial(self._feed, self._running))
        if self._running is not None:
            patience_s = self._patience_s(self._running)
        for key, _ in self._selector.select(patience_s):
            key.data()

    def _feed(self, running: _Running) -> None:
        now_s = time.monotonic()
        self._requests.bring(running.core.feed(now_s))
        self._requests.expire(now_s)
        running.heartbeats.ask()

    def _patience_s(self, running: _Running) -> float:
        """How long nothing may happen before time itself brings something to do."""
        now_s = time.monotonic()
        times = [running.core.wake_at_s, self._requests.wake_at_s]
        waits = [max(0.0, time_s - now_s) for time_s in times if time_s is not None]
        return min([running.heartbeats.patience_s(), *waits])

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do what may find a replica dead: the engine then fails as a whole."""
        try:
            action()
        except EngineError as error:
            self._fail(error)

    def _meet(self) -> None:
        """Take in new fronts. Raises ChannelClosed at the owner's end."""
        for _, (fd,) in self._owner.arrived():
            self._fronts.add(socket.socket(fileno=fd))

    def _begin(self, started: Started, told: Running) -> None:
        core = EngineCore(started.replicas, self._telemetry.planned)
        ranks, silent_after_s = started.plan.ranks, self._config.silent_after_s
        heartbeats = Heartbeats(started.replicas, ranks, silent_after_s)
        self._running = _Running(started, core, heartbeats)
        self._requests.begin(core, started.plan.max_model_len)
        for replica in started.replicas:
            read = partial(self._collect, replica)
            self._selector.register(replica.executor.fileno(), selectors.EVENT_READ, read)
        self._fronts.tell(told)

    def _fail(self, error: SpanwiseError) -> None:
        """Nothing can be computed any more; fronts are told, and stay to be told."""
        running, self._running = self._running, None
        self._requests.fail()
        if running is not None:
            for replica in running.started.replicas:
                self._selector.unregister(replica.executor.fileno())
            running.core.close()
            running.started.close()
        self._fronts.tell_end(EngineFailed(failure_of(error, "the engine")))

    # -- what fronts say -------------------------------------------------------------------------

    def _hear(self, front: FrontPort, message: FromFront) -> None:
        match message:
            case AskHealth():
                self._fronts.send(front, Health(self._health()))
            case CountRefused(num_requests):
                self._telemetry.refused(num_requests)
            case AskStats():
                self._fronts.send(front, Stats(self._stats()))
            case _:
                self._requests.hear(front, message)

    def _part(self, front: FrontPort) -> None:
        self._requests.part(front)

    # -- what replicas bring ---------------------------------------------------------------------

    def _collect(self, replica: LanguageReplica) -> None:
        if self._running is not None:
            core = self._running.core
            self._guarded(lambda: self._requests.bring(core.collect(replica)))

    def _health(self) -> EngineHealth:
        if self._running is None:
            return EngineHealth(False, reason="the engine does not run")
        return self._running.heartbeats.health()

    def _stats(self) -> EngineStats:
        if self._running is None:
            return self._telemetry.stats(())
        core, started = self._running.core, self._running.started
        cache = CacheInfo(
            block_size=started.scheduling.cache.block_size,
            num_tokens=started.plan.cache_tokens,
            prefix_caching=started.scheduling.prefix_caching,
        )
        counted = self._telemetry.stats([replica.scheduler for replica in core.replicas])
        devices = self._running.heartbeats.devices()
        return msgspec.structs.replace(counted, devices=devices, cache=cache)


def main(
    config: ServiceConfig, owner_fd: int, supervisor_fd: int, journal_fd: int, lifeline_fd: int
) -> None:
    """Serve until the owner's channel ends."""
    hang_on(lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner to decide on
    owner: Channel[AddFront] = Channel(socket.socket(fileno=owner_fd), AddFront)
    supervisor = RemoteSupervisor(socket.socket(fileno=supervisor_fd))
    EngineServer(config, owner, supervisor, JournalLog(journal_fd)).run()
    os._exit(0)  # the supervisor ends what is below


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[5], type=ServiceConfig), *map(int, sys.argv[1:5]))
