"""The engine's requests: who asks for them, what of them runs, what may be asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from spanwise.control.admission import Admission
from spanwise.control.answers import Answers
from spanwise.control.entries import Finished, Forgotten
from spanwise.control.replay import Replay
from spanwise.engine import journal_entries
from spanwise.engine.config import ServiceConfig
from spanwise.engine.core import EngineCore
from spanwise.engine.fronts import FrontPort
from spanwise.engine.journal_log import JournalLog
from spanwise.engine.messages import (
    Abort,
    Accepted,
    Admit,
    Admitted,
    Attach,
    Bound,
    ChoiceUpdate,
    EndChoice,
    News,
    Refused,
    RequestFailed,
    Submit,
    ToFront,
)
from spanwise.engine.telemetry import Telemetry
from spanwise.errors import InputError, KeyReusedError
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.stats import EndReason
from spanwise.scheduler.update import SequenceUpdate
from spanwise.worker.failure import failure_of


@dataclass(eq=False)
class _Request:
    """A request that was admitted; ``running`` are the choices of its sequences that still run.

    ``number`` is its own among all fronts'; ``asked`` is what its first front said. With
    ``is_resumable`` it goes on when nobody reads it, and may be asked for again.
    """

    number: int
    asked: Admit
    readers: list[_Reader] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    replay: Replay | None = None
    is_journalled: bool = False
    is_submitted: bool = False
    is_resumable: bool = False
    has_failed: bool = False
    is_over: bool = False


@dataclass(eq=False)
class _Reader:
    """A front that asks for a request. ``follows``: it is told what comes of it."""

    request: _Request
    front: FrontPort
    asked: Admit
    follows: bool


class Requests:
    """Every request, from its admission until nobody may ask for it any more.

    ``tell(front, message)`` reaches a front; nothing happens where it has gone. Nothing is admitted
    before ``begin``, nor after ``fail``. What a replica raises, its methods raise.
    """

    def __init__(
        self,
        config: ServiceConfig,
        journal: JournalLog,
        telemetry: Telemetry,
        tell: Callable[[FrontPort, ToFront], None],
    ) -> None:
        self._journal, self._telemetry, self._tell = journal, telemetry, tell
        self._admission = Admission(config.admission)
        self._answers: Answers[_Request] = Answers(config.resume_window_s)
        self._readers: dict[tuple[FrontPort, int], _Reader] = {}
        self._request_of: dict[int, _Request] = {}
        self._numbers, self._sequence_ids = count(), count()
        self._core: EngineCore[SequenceRequest] | None = None
        self._max_model_len = 0

    def begin(self, core: EngineCore[SequenceRequest], max_model_len: int) -> None:
        """Requests are taken from now on."""
        self._core, self._max_model_len = core, max_model_len
        self._admission.num_seats = core.num_seats

    def fail(self) -> None:
        """Nothing can be computed any more; fronts are told by whoever calls this."""
        self._core = None
        asked_for = [reader.request for reader in self._readers.values()]
        for request in dict.fromkeys([*asked_for, *self._request_of.values()]):
            if not request.is_over:
                self._release(request)
        self._readers.clear()
        self._request_of.clear()
        self._answers.clear()

    @property
    def wake_at_s(self) -> float | None:
        """When time alone will give ``expire`` something to do."""
        return self._answers.wake_at_s

    def expire(self, now_s: float) -> None:
        """Let go of answers that have been kept for long enough."""
        self._let_go(self._answers.expire(now_s))

    # -- what fronts say -------------------------------------------------------------------------

    def hear(self, front: FrontPort, message: Admit | Submit | Attach | EndChoice | Abort) -> None:
        """A front says something of a request."""
        if isinstance(message, Admit):
            self._admit(front, message)
            return
        reader = self._readers.get((front, message.request_id))
        if reader is None:
            return  # it has ended meanwhile
        match message:
            case Submit():
                self._submit(reader, message)
            case Attach():
                self._attach(reader)
            case EndChoice():
                self._end_choice(reader.request, message)
            case Abort():
                self._leave(reader)

    def part(self, front: FrontPort) -> None:
        """A front has gone."""
        for key, reader in list(self._readers.items()):
            # What ends with one request may take others along.
            if reader.front is front and key in self._readers:
                self._leave(reader, runs_on=reader.request.is_resumable)

    def _admit(self, front: FrontPort, asked: Admit) -> None:
        if self._core is None:
            refused = Refused(asked.request_id, "the engine is not ready yet", 1.0, False)
            self._tell(front, refused)
            return
        try:
            known = None if asked.resume is None else self._answers.find(asked.resume)
        except KeyReusedError as error:
            failed = failure_of(error, "the request")
            self._tell(front, RequestFailed(asked.request_id, failed))
            return
        if known is not None:
            self._bind(self._add_reader(known, front, asked, follows=False))
            return
        number, now_s = next(self._numbers), time.monotonic()
        refusal = self._admission.admit(
            number, asked.tenant, asked.num_tokens, now_s, asked.is_further
        )
        if refusal is not None:
            self._telemetry.refused()
            refused = Refused(
                asked.request_id,
                refusal.message,
                refusal.retry_after_s,
                refusal.kind == "tenant",
                refusal.for_all,
            )
            self._tell(front, refused)
            return
        request = _Request(number, asked)
        self._add_reader(request, front, asked, follows=True)
        if asked.resume is not None:
            self._answers.begin(asked.resume, request)
            request.is_resumable = True
        self._tell(front, Admitted(asked.request_id))

    def _bind(self, reader: _Reader) -> None:
        """Tell a reader that its request was asked for before; it waits where that still forms."""
        request, replay = reader.request, reader.request.replay
        if request.is_submitted:
            assert request.asked.resume is not None and replay is not None
            name, request_id = request.asked.resume.name, reader.asked.request_id
            self._tell(reader.front, Bound(request_id, name, replay.prompt_token_ids))

    def _attach(self, reader: _Reader) -> None:
        request, request_id = reader.request, reader.asked.request_id
        assert request.replay is not None, "never bound"
        reader.follows = True
        said = request.replay.updates()
        if request.is_over:
            self._remove(reader)
        if said:
            self._tell(reader.front, News(tuple(ChoiceUpdate(request_id, *each) for each in said)))

    def _submit(self, reader: _Reader, wanted: Submit) -> None:
        request = reader.request
        if self._core is None:
            return  # the engine has failed meanwhile, and said so
        try:
            self._add(request, wanted, self._core)
        except InputError as error:
            self._leave(reader)
            failed = failure_of(error, "the request")
            self._tell(reader.front, RequestFailed(wanted.request_id, failed))
            return
        request.is_submitted = True
        num_prompt, num_choices = len(wanted.prompt_token_ids), len(wanted.choices)
        self._admission.settle(request.number, num_prompt, num_choices)
        self._tell(reader.front, Accepted(wanted.request_id))
        for other in [other for other in request.readers if not other.follows]:
            self._bind(other)

    def _add(self, request: _Request, wanted: Submit, core: EngineCore[SequenceRequest]) -> None:
        """Queue every choice. Raises InputError where one could never run."""
        num_prompt = len(wanted.prompt_token_ids)
        room = max(self._max_model_len - num_prompt, 0)
        expected = num_prompt + min(wanted.max_tokens or room, room)
        specs = {next(self._sequence_ids): spec for spec in wanted.choices}
        self._journal.write(journal_entries.admitted(request.number, request.asked, wanted, specs))
        request.is_journalled = True
        if request.is_resumable:
            request.replay = Replay(wanted.prompt_token_ids, len(specs))
        for choice, (sequence_id, spec) in enumerate(specs.items()):
            sequence = SequenceRequest(
                sequence_id=sequence_id,
                prompt_token_ids=wanted.prompt_token_ids,
                sampling=spec,
                max_tokens=wanted.max_tokens,
                stop_token_ids=wanted.stop_token_ids,
                task=wanted.task,
                priority=wanted.priority,
                tenant=request.asked.tenant,
                deadline_s=wanted.deadline_s,
                cache_salt=wanted.cache_salt,
            )
            replica = core.add(sequence, expected)
            self._telemetry.queued(sequence_id, replica, num_prompt, request.asked.arrived_s)
            if choice == 0:
                self._telemetry.asked(replica, len(specs), wanted.max_tokens)
            request.running[sequence_id] = choice
            self._request_of[sequence_id] = request

    def _end_choice(self, request: _Request, end: EndChoice) -> None:
        """The text of a choice has ended, as one reader has found."""
        if request.replay is not None:
            request.replay.cut(end.choice, end.num_tokens)
        for sequence_id, choice in list(request.running.items()):
            if choice == end.choice:
                finished = Finished(sequence_id, "stop", end.stop_reason, end.num_tokens)
                self._journal.write(finished)
                self._end_sequence(request, sequence_id, "stop")
        if request.is_submitted and not request.running and not request.is_over:
            self._finish(request)

    # -- who asks --------------------------------------------------------------------------------

    def _add_reader(
        self, request: _Request, front: FrontPort, asked: Admit, *, follows: bool
    ) -> _Reader:
        reader = _Reader(request, front, asked, follows)
        request.readers.append(reader)
        self._readers[front, asked.request_id] = reader
        return reader

    def _remove(self, reader: _Reader) -> None:
        del self._readers[reader.front, reader.asked.request_id]
        reader.request.readers.remove(reader)

    def _leave(self, reader: _Reader, *, runs_on: bool = False) -> None:
        """Somebody reads no more of a request, which ends with its last reader unless it runs on.

        One that was never submitted ends with the only one who could do that; the others ask anew.
        """
        request = reader.request
        self._remove(reader)
        if request.is_over:
            return
        if not request.is_submitted and reader.follows:
            self._end(request)
            while request.readers:
                other = request.readers[0]
                self._remove(other)
                self._admit(other.front, other.asked)
        elif not request.readers and not runs_on:
            self._end(request)

    # -- ends ------------------------------------------------------------------------------------

    def _finish(self, request: _Request) -> None:
        """Every choice has ended."""
        self._release(request)
        resume = request.asked.resume
        if resume is None or request.replay is None or not request.is_resumable:
            self._dismiss(request)
        elif request.has_failed:
            self._forget_answer(request)
        else:
            size = request.replay.num_bytes
            self._let_go(self._answers.end(resume, size, time.monotonic()))

    def _end(self, request: _Request) -> None:
        """End whatever of a request still runs; nothing is kept of it."""
        for sequence_id in list(request.running):
            self._end_sequence(request, sequence_id, "abort")
        self._release(request)
        self._forget_answer(request)

    def _end_sequence(self, request: _Request, sequence_id: int, reason: EndReason) -> None:
        del request.running[sequence_id], self._request_of[sequence_id]
        self._telemetry.ended(sequence_id, reason, time.monotonic())
        if self._core is not None:
            self._core.end(sequence_id)

    def _release(self, request: _Request) -> None:
        """A request takes no place any more."""
        request.is_over = True
        self._admission.release(request.number, time.monotonic())
        if request.is_journalled:
            self._journal.write(Forgotten(request.number))

    def _forget_answer(self, request: _Request) -> None:
        """A part of an answer has failed: the rest of it is of no use but to those who read it."""
        if not request.is_resumable or request.asked.resume is None:
            self._dismiss(request)
            return
        parts = self._answers.forget(request.asked.resume.key)
        self._let_go(parts)
        for part in parts:
            if not part.readers and not part.is_over:
                self._end(part)

    def _let_go(self, requests: Iterable[_Request]) -> None:
        """These cannot be asked for again."""
        for request in requests:
            request.is_resumable = False
            if request.is_over:
                self._dismiss(request)

    def _dismiss(self, request: _Request) -> None:
        """Nothing more is expected of those who have read all of a request."""
        for reader in [reader for reader in request.readers if reader.follows]:
            self._remove(reader)

    # -- what replicas bring ---------------------------------------------------------------------

    def bring(self, updates: list[SequenceUpdate]) -> None:
        """Bring updates to the journal and then to the fronts, one message to each."""
        known = [update for update in updates if update.sequence_id in self._request_of]
        if not known:
            return  # ended while their last step ran
        self._journal.write(journal_entries.accepted(known))
        now_s, at = time.monotonic(), int(time.time())
        news: dict[FrontPort, list[ChoiceUpdate]] = {}
        ended = []
        for update in known:
            request = self._request_of[update.sequence_id]
            choice = request.running[update.sequence_id]
            if request.replay is not None:
                request.replay.take(choice, update, at)
            for reader in request.readers:
                if reader.follows:
                    told = ChoiceUpdate(reader.asked.request_id, choice, update, at)
                    news.setdefault(reader.front, []).append(told)
            self._telemetry.brought(update, now_s)
            self._admission.begun(request.number, now_s)
            if update.finish_reason is not None:
                request.has_failed |= update.finish_reason == "deadline"
                del request.running[update.sequence_id], self._request_of[update.sequence_id]
                if not request.running:
                    ended.append(request)
        for front, brought in news.items():
            self._tell(front, News(tuple(brought)))
        for request in ended:
            if not request.is_over:
                self._finish(request)  # else its front has just gone, and it with that
