"""The engine's table of requests: who asks, who follows, and what is left when they go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from spanwise.control.admission import AdmissionLimits
from spanwise.engine import requests as module
from spanwise.engine.config import EngineConfig, ServiceConfig
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
    EndChoice,
    News,
    Refused,
    RequestFailed,
    Submit,
    ToFront,
)
from spanwise.engine.requests import Requests
from spanwise.engine.telemetry import Telemetry
from spanwise.errors import InputError
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.outputs import FinishReason
from spanwise.types.resume import AnswerName, Resume
from spanwise.types.sampling import SamplingSpec

PROMPT = (5, 6, 7)


class Core:
    """Takes sequences, and computes nothing."""

    num_seats = 64

    def __init__(self) -> None:
        self.running: list[int] = []
        self.num_added = 0
        self.refusal: InputError | None = None

    def add(self, request: SequenceRequest, num_tokens: int) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.running.append(request.sequence_id)
        self.num_added += 1
        return 0

    def end(self, sequence_id: int) -> None:
        self.running.remove(sequence_id)


class Table:
    """Requests, with fronts that are names, and a clock that a test moves."""

    def __init__(self, journal_fd: int, **admission: Any) -> None:
        self.core, self.now_s = Core(), 1000.0
        self.said: dict[str, list[ToFront]] = {"a": [], "b": [], "c": []}
        self.journal = JournalLog(journal_fd)
        config = ServiceConfig(
            engine=EngineConfig(model="m"), admission=AdmissionLimits(**admission)
        )
        telemetry = cast(Telemetry, Mock(spec=Telemetry))
        self.requests = Requests(config, self.journal, telemetry, self._tell)
        self.requests.begin(cast(EngineCore[SequenceRequest], self.core), 100)
        self._ids = count()

    def _tell(self, front: FrontPort, message: ToFront) -> None:
        if front in self.said:
            self.said[cast(str, front)].append(message)

    def hear(self, front: str, message: Any) -> list[ToFront]:
        """What the front is told in answer."""
        before = len(self.said[front])
        self.requests.hear(cast(FrontPort, front), message)
        return self.said[front][before:]

    def part(self, front: str) -> None:
        del self.said[front]
        self.requests.part(cast(FrontPort, front))

    def ask(self, front: str, resume: Resume | None = None) -> int:
        """A request that was admitted or bound, or neither yet."""
        request_id = next(self._ids)
        self.hear(front, Admit(request_id, 3, "tenant", self.now_s, resume))
        return request_id

    def submit(self, front: str, request_id: int, num_choices: int = 1) -> list[ToFront]:
        specs = tuple(SamplingSpec(choice=i) for i in range(num_choices))
        return self.hear(front, Submit(request_id, PROMPT, specs, 20, ()))

    def run(self, front: str, resume: Resume | None = None, num_choices: int = 1) -> int:
        request_id = self.ask(front, resume)
        self.submit(front, request_id, num_choices)
        return request_id

    def bring(self, sequence_id: int, *token_ids: int, end: FinishReason | None = None) -> None:
        update = SequenceUpdate(sequence_id=sequence_id, token_ids=token_ids, finish_reason=end)
        if end is not None:
            self.core.running.remove(sequence_id)
        self.requests.bring([update])

    def tokens(self, front: str, request_id: int) -> list[int]:
        """All that was told of the first choice of a request."""
        news = [message for message in self.said[front] if isinstance(message, News)]
        return [
            token
            for message in news
            for each in message.updates
            if each.request_id == request_id and each.choice == 0
            for token in each.update.token_ids
        ]

    def is_empty(self) -> bool:
        """Whether nothing is left of anything."""
        table = vars(self.requests)
        holders = ("_readers", "_request_of", "_answers")
        return not any(len(table[name]) for name in holders) and not len(self.journal.journal)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    fd = os.memfd_create("journal")
    made = Table(fd, max_requests_per_tenant=4)
    clock = SimpleNamespace(monotonic=lambda: made.now_s, time=lambda: made.now_s)
    monkeypatch.setattr(module, "time", clock)
    yield made
    os.close(fd)


def keyed(part: int = 0, body: bytes = b"body", name: str = "first") -> Resume:
    return Resume(b"key", body, AnswerName(name, 1), part)


def test_without_a_key_a_request_ends_with_its_front(table: Table) -> None:
    table.run("a")
    table.run("b")
    table.part("a")
    assert table.core.running == [1]
    table.bring(1, 11, end="length")
    assert table.is_empty()


def test_with_a_key_it_runs_on_and_is_told_again_from_its_beginning(table: Table) -> None:
    table.run("a", keyed())
    assert [entry.resume for entry in table.journal.journal.snapshot()] == [keyed()]
    table.bring(0, 11)
    table.part("a")
    table.bring(0, 12)
    again = table.ask("b", keyed(name="second"))
    assert table.said["b"] == [Bound(again, AnswerName("first", 1), PROMPT)]
    table.bring(0, 13)
    assert table.tokens("b", again) == [], "it has not said that it listens"
    table.hear("b", Attach(again))
    table.bring(0, 14, end="length")
    assert table.tokens("b", again) == [11, 12, 13, 14]
    late = table.ask("c", keyed())
    table.hear("c", Attach(late))
    assert table.tokens("c", late) == [11, 12, 13, 14]
    assert table.core.num_added == 1
    assert not len(table.journal.journal), "what has ended needs no new engine"
    assert table.requests.wake_at_s == table.now_s + 60
    table.requests.expire(table.now_s + 60)
    assert table.is_empty()
    assert table.hear("c", Admit(99, 3, "tenant", 0.0, keyed())) == [Admitted(99)]


def test_whoever_asks_while_it_forms_waits_and_takes_no_place(table: Table) -> None:
    first = table.ask("a", keyed())
    others = [table.ask("b", keyed()) for _ in range(8)]
    assert table.said["b"] == []
    assert table.submit("a", first) == [Accepted(first)]
    name = AnswerName("first", 1)
    assert table.said["b"] == [Bound(other, name, PROMPT) for other in others]
    for other in others[1:]:
        table.hear("b", Attach(other))
    table.bring(0, 11, end="length")
    table.hear("b", Attach(others[0]))
    assert [table.tokens("b", other) for other in others] == [[11]] * 8
    assert all(isinstance(each, Bound | News) for each in table.said["b"])


@pytest.mark.parametrize("how", ["it leaves", "its front dies", "it cannot be"])
def test_where_the_first_ends_before_it_runs_the_next_takes_its_place(
    table: Table, how: str
) -> None:
    first = table.ask("a", keyed())
    second, third = table.ask("b", keyed(name="second")), table.ask("c", keyed())
    if how == "it leaves":
        table.hear("a", Abort(first))
    elif how == "its front dies":
        table.part("a")
    else:
        table.core.refusal = InputError("no")
        assert isinstance(table.submit("a", first)[0], RequestFailed)
        table.core.refusal = None
    assert table.said["b"] == [Admitted(second)] and table.said["c"] == []
    table.submit("b", second)
    assert table.said["c"] == [Bound(third, AnswerName("second", 1), PROMPT)]
    table.hear("c", Abort(third))
    table.hear("b", Abort(second))
    assert table.is_empty() and not table.core.running


def test_it_ends_with_the_last_who_leaves_and_then_is_no_more(table: Table) -> None:
    first = table.run("a", keyed())
    second = table.ask("b", keyed())
    table.hear("a", Abort(first))
    table.hear("b", Attach(second))
    table.bring(0, 11)
    assert table.tokens("a", first) == [] and table.tokens("b", second) == [11]
    table.hear("b", Abort(second))
    assert not table.core.running and table.is_empty()


def test_another_body_is_refused_and_disturbs_nobody(table: Table) -> None:
    table.run("a", keyed())
    (told,) = table.hear("b", Admit(7, 3, "tenant", 0.0, keyed(body=b"other")))
    assert isinstance(told, RequestFailed) and told.error.kind == "KeyReusedError"
    table.part("b")
    table.bring(0, 11, end="length")
    assert table.requests.wake_at_s is not None


def test_what_is_refused_is_not_kept(table: Table) -> None:
    for _ in range(4):
        table.run("a")
    refused = table.hear("b", Admit(50, 3, "tenant", 0.0, keyed()))
    assert isinstance(refused[0], Refused)
    table.bring(0, 1, end="length")
    assert table.hear("b", Admit(51, 3, "tenant", 0.0, keyed())) == [Admitted(51)]


def test_an_answer_that_came_too_late_is_not_kept(table: Table) -> None:
    table.run("a", keyed())
    second = table.ask("b", keyed())
    table.bring(0, end="deadline")
    table.hear("b", Attach(second))
    told = table.said["b"][-1]
    assert isinstance(told, News) and told.updates[0].update.finish_reason == "deadline"
    assert table.is_empty()


def test_a_part_that_fails_takes_those_along_that_nobody_reads(table: Table) -> None:
    parts = [table.run("a", keyed(part)) for part in range(2)]
    third = table.run("b", keyed(2))
    table.hear("b", Attach(table.ask("b", keyed(1))))
    ended = table.run("c", keyed(3))
    table.bring(3, 31, end="length")
    table.part("a")
    assert table.core.running == [0, 1, 2]
    table.bring(2, end="deadline")
    assert table.core.running == [1], "the one that is read"
    table.bring(1, 12, end="length")
    assert table.is_empty(), (parts, third, ended)


def test_all_fronts_gone_before_all_parts_run(table: Table) -> None:
    table.run("a", keyed(0))
    table.bring(0, 1, end="length")
    table.ask("a", keyed(1))
    table.part("a")
    assert table.is_empty(), "half an answer is none"


def test_a_front_dies_whose_later_part_takes_an_earlier_one_along(table: Table) -> None:
    table.ask("a", keyed(1))
    table.run("a", keyed(0))
    table.bring(0, 1, end="length")
    table.part("a")
    assert table.is_empty()


def test_text_that_ended_early_is_told_again_as_it_was(table: Table) -> None:
    first = table.run("a", keyed())
    table.bring(0, 11)
    table.bring(0, 12)
    table.bring(0, 13, end="stop")
    table.hear("a", EndChoice(first, 0, None, 2))  # it had come to the second when it ended
    again = table.ask("b", keyed())
    table.hear("b", Attach(again))
    assert table.tokens("b", again) == [11, 12]
    assert cast(News, table.said["b"][-1]).updates[-1].update.finish_reason == "stop"


def test_a_choice_that_its_text_ends_frees_its_sequence(table: Table) -> None:
    first = table.run("a", keyed(), num_choices=2)
    table.bring(0, 11)
    table.hear("a", EndChoice(first, 0, "stop", 1))
    assert table.core.running == [1]
    table.hear("a", EndChoice(first, 1, None, 0))
    assert not table.core.running and table.requests.wake_at_s is not None


def test_when_the_engine_fails_nothing_is_left(table: Table) -> None:
    table.run("a", keyed())
    table.ask("b", keyed())
    table.run("c")
    table.requests.fail()
    assert table.is_empty()
    assert isinstance(table.hear("a", Admit(9, 3, "", 0.0, keyed()))[0], Refused)
