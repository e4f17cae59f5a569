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
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import msgspec

from spanwise.control.admission import Admission
from spanwise.control.entries import Accepted as AcceptedTokens
from spanwise.control.entries import Admitted as AdmittedRequest
from spanwise.control.entries import ChoiceRecord, Finished, Forgotten
from spanwise.engine.config import ServiceConfig
from spanwise.engine.core import EngineCore
from spanwise.engine.fronts import FrontPort, Fronts
from spanwise.engine.heartbeats import Heartbeats
from spanwise.engine.journal_log import JournalLog
from spanwise.engine.launch import ReplicaHandle, Started
from spanwise.engine.messages import (
    Abort,
    Accepted,
    AddFront,
    Admit,
    Admitted,
    AskHealth,
    AskStats,
    ChoiceUpdate,
    EndChoice,
    EngineFailed,
    FromFront,
    Health,
    News,
    Refused,
    RequestFailed,
    Running,
    Stats,
    Submit,
)
from spanwise.engine.start import Start
from spanwise.engine.telemetry import Telemetry
from spanwise.errors import EngineError, InputError, SpanwiseError
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TokenLogprobs
from spanwise.types.serving import EngineHealth, EngineStats
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.failure import failure_of
from spanwise.worker.lifeline import hang_on
from spanwise.worker.remote_supervisor import RemoteSupervisor


@dataclass(eq=False)
class _Request:
    """An admitted request; ``choice_of`` are its sequences that still run.

    ``number`` is its own among all fronts'.
    """

    number: int
    front: FrontPort
    wanted: Admit
    choice_of: dict[int, int] = field(default_factory=dict)
    is_journalled: bool = False


@dataclass(frozen=True)
class _Running:
    """The parts of an engine that runs."""

    started: Started
    core: EngineCore
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
        self._config, self._owner, self._journal = config, owner, journal
        self._admission = Admission(config.admission)
        self._selector = selectors.DefaultSelector()
        self._fronts = Fronts(self._selector, self._hear, self._part)
        self._requests: dict[tuple[FrontPort, int], _Request] = {}
        self._request_of: dict[int, _Request] = {}
        self._numbers, self._sequence_ids = count(), count()
        self._telemetry = Telemetry()
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
        self._bring(running.core.feed(time.monotonic()))
        running.heartbeats.ask()

    def _patience_s(self, running: _Running) -> float:
        """How long nothing may happen before time itself brings something to do."""
        wake_at_s = running.core.wake_at_s
        patience_s = running.heartbeats.patience_s()
        if wake_at_s is None:
            return patience_s
        return max(0.0, min(patience_s, wake_at_s - time.monotonic()))

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
        core = EngineCore(started.replicas, started.scheduling)
        self._running = _Running(
            started, core, Heartbeats(started.replicas, self._config.silent_after_s)
        )
        for replica in started.replicas:
            read = partial(self._collect, replica)
            self._selector.register(replica.executor.fileno(), selectors.EVENT_READ, read)
        self._fronts.tell(told)

    def _fail(self, error: SpanwiseError) -> None:
        """Nothing can be computed any more; fronts are told, and stay to be told."""
        running, self._running = self._running, None
        for request in list(self._requests.values()):
            self._forget(request)
        self._request_of.clear()
        if running is not None:
            for replica in running.started.replicas:
                self._selector.unregister(replica.executor.fileno())
            running.core.close()
            running.started.close()
        self._fronts.tell_end(EngineFailed(failure_of(error, "the engine")))

    # -- what fronts say -------------------------------------------------------------------------

    def _hear(self, front: FrontPort, message: FromFront) -> None:
        match message:
            case Admit():
                self._admit(front, message)
            case Submit():
                self._submit(front, message)
            case EndChoice():
                self._end_choice(front, message)
            case Abort(request_id):
                self._end(front, request_id)
            case AskHealth():
                self._fronts.send(front, Health(self._health()))
            case AskStats():
                self._fronts.send(front, Stats(self._stats()))

    def _part(self, front: FrontPort) -> None:
        for owner, request_id in list(self._requests):
            if owner is front:
                self._end(front, request_id)

    def _admit(self, front: FrontPort, wanted: Admit) -> None:
        request_id = wanted.request_id
        if self._running is None:
            refused = Refused(request_id, "the engine is not ready yet", 1.0, False)
            self._fronts.send(front, refused)
            return
        number, now_s = next(self._numbers), time.monotonic()
        refusal = self._admission.admit(number, wanted.tenant, wanted.num_tokens, now_s)
        if refusal is not None:
            self._telemetry.refused()
            of_tenant = refusal.kind == "tenant"
            refused = Refused(request_id, refusal.message, refusal.retry_after_s, of_tenant)
            self._fronts.send(front, refused)
            return
        self._requests[front, request_id] = _Request(number, front, wanted)
        self._fronts.send(front, Admitted(request_id))

    def _submit(self, front: FrontPort, wanted: Submit) -> None:
        request = self._requests.get((front, wanted.request_id))
        if request is None or self._running is None:
            return  # the engine has failed meanwhile, and said so
        try:
            self._add(request, wanted, self._running)
        except InputError as error:
            self._end(front, wanted.request_id)
            failed = failure_of(error, "the request")
            self._fronts.send(front, RequestFailed(wanted.request_id, failed))
            return
        num_prompt = len(wanted.prompt_token_ids)
        self._admission.settle(request.number, num_prompt)
        self._telemetry.queued(num_prompt)
        self._fronts.send(front, Accepted(wanted.request_id))

    def _add(self, request: _Request, wanted: Submit, running: _Running) -> None:
        """Queue every choice. Raises InputError where one could never run."""
        num_prompt = len(wanted.prompt_token_ids)
        room = max(running.started.plan.max_model_len - num_prompt, 0)
        expected = num_prompt + min(wanted.max_tokens or room, room)
        specs = {next(self._sequence_ids): spec for spec in wanted.choices}
        self._journal.write(
            AdmittedRequest(
                request_id=request.number,
                prompt_token_ids=wanted.prompt_token_ids,
                choices=tuple(ChoiceRecord(each, spec) for each, spec in specs.items()),
                max_tokens=wanted.max_tokens,
                stop_token_ids=wanted.stop_token_ids,
                stop_strings=wanted.stop_strings,
                skip_special_tokens=wanted.skip_special_tokens,
                task=wanted.task,
                priority=wanted.priority,
                tenant=request.wanted.tenant,
                cache_salt=wanted.cache_salt,
                deadline_s=wanted.deadline_s,
            )
        )
        request.is_journalled = True
        for choice, (sequence_id, spec) in enumerate(specs.items()):
            sequence = SequenceRequest(
                sequence_id=sequence_id,
                prompt_token_ids=wanted.prompt_token_ids,
                sampling=spec,
                max_tokens=wanted.max_tokens,
                stop_token_ids=wanted.stop_token_ids,
                task=wanted.task,
                priority=wanted.priority,
                tenant=request.wanted.tenant,
                deadline_s=wanted.deadline_s,
                cache_salt=wanted.cache_salt,
            )
            running.core.add(sequence, expected)
            request.choice_of[sequence_id] = choice
            self._request_of[sequence_id] = request

    def _end_choice(self, front: FrontPort, end: EndChoice) -> None:
        """A stop string has ended a choice."""
        request = self._requests.get((front, end.request_id))
        if request is None:
            return
        for sequence_id, index in list(request.choice_of.items()):
            if index == end.choice:
                finished = Finished(sequence_id, "stop", end.stop_reason, end.num_tokens)
                self._journal.write(finished)
                self._end_sequence(request, sequence_id, "stop")
        if not request.choice_of:
            self._forget(request)

    def _end(self, front: FrontPort, request_id: int) -> None:
        """End a request, whatever of it still runs; nothing happens where it has ended."""
        request = self._requests.get((front, request_id))
        if request is None:
            return
        for sequence_id in list(request.choice_of):
            self._end_sequence(request, sequence_id, "abort")
        self._forget(request)

    def _forget(self, request: _Request) -> None:
        """Nothing more will be said of a request."""
        del self._requests[request.front, request.wanted.request_id]
        self._admission.release(request.number, time.monotonic())
        if request.is_journalled:
            self._journal.write(Forgotten(request.number))

    def _end_sequence(self, request: _Request, sequence_id: int, reason: str) -> None:
        del request.choice_of[sequence_id], self._request_of[sequence_id]
        self._telemetry.ended(sequence_id, reason)
        if self._running is not None:
            self._running.core.end(sequence_id)

    # -- what replicas bring ---------------------------------------------------------------------

    def _collect(self, replica: ReplicaHandle) -> None:
        if self._running is not None:
            core = self._running.core
            self._guarded(lambda: self._bring(core.collect(replica)))

    def _bring(self, updates: list[SequenceUpdate]) -> None:
        """Bring updates to the journal and then to the fronts, one message to each."""
        known = [update for update in updates if update.sequence_id in self._request_of]
        if not known:
            return  # ended while their last step ran
        self._journal.write(_entry(known))
        now_s = time.monotonic()
        news: dict[FrontPort, list[ChoiceUpdate]] = {}
        ended = []
        for update in known:
            request = self._request_of[update.sequence_id]
            choice = request.choice_of[update.sequence_id]
            told = ChoiceUpdate(request.wanted.request_id, choice, update)
            news.setdefault(request.front, []).append(told)
            self._telemetry.brought(update, request.wanted.arrived_s, now_s)
            self._admission.begun(request.number, now_s)
            if update.finish_reason is not None:
                del request.choice_of[update.sequence_id], self._request_of[update.sequence_id]
                if not request.choice_of:
                    ended.append(request)
        for front, brought in news.items():
            self._fronts.send(front, News(tuple(brought)))
        for request in ended:
            if (request.front, request.wanted.request_id) in self._requests:
                self._forget(request)  # else its front has just gone, and it with that

    def _health(self) -> EngineHealth:
        if self._running is None:
            return EngineHealth(False, reason="the engine does not run")
        return self._running.heartbeats.health()

    def _stats(self) -> EngineStats:
        replicas = self._running.core.replicas if self._running is not None else ()
        return self._telemetry.stats([replica.scheduler for replica in replicas])


def _entry(updates: list[SequenceUpdate]) -> AcceptedTokens:
    """What of a step's updates must survive. A pooled prompt is done once its vector has left."""
    tokens = [(each.sequence_id, token) for each in updates for token in each.token_ids]
    ends = [
        Finished(each.sequence_id, each.finish_reason, each.stop_reason)
        for each in updates
        if each.finish_reason is not None and each.pooled is None
    ]
    logprobs = tuple(x for each in updates for x in _logprobs(each))
    return AcceptedTokens(
        tuple(sequence_id for sequence_id, _ in tokens),
        tuple(token for _, token in tokens),
        tuple(ends),
        logprobs if any(x is not None for x in logprobs) else (),
    )


def _logprobs(update: SequenceUpdate) -> tuple[TokenLogprobs | None, ...]:
    return update.logprobs or (None,) * len(update.token_ids)


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
