"""The loop of a job, with a task that is none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spanwise.errors import EngineError, InputError, SpanwiseError
from spanwise.jobs.item import Extent, Item
from spanwise.jobs.job import Job, JobProgress
from spanwise.jobs.results import Results
from spanwise.jobs.task import Finished


class Numbers:
    """So many numbers; ``num_read`` counts how far it was read."""

    def __init__(self, num_items: int) -> None:
        self.num_items, self.num_read = num_items, 0

    def extent(self) -> Extent:
        return Extent(self.num_items, str(self.num_items))

    def items(self, first: int) -> Iterator[Item]:
        for index in range(first, self.num_items):
            self.num_read = index + 1
            yield Item(index, f"number {index}", index)


class Doubling:
    """Doubles numbers, in any order. Multiples of 10 cannot be prepared, 11 started, 13 computed.

    ``breaks_at``: so many items later the engine fails.
    """

    capacity = 8

    def __init__(self, source: Numbers, breaks_at: int = -1) -> None:
        self._source, self._left = source, breaks_at
        self._running: list[int] = []
        self._chance = random.Random(5)
        self.started: list[int] = []
        self.most_ahead = 0

    def prepare(self, item: Item) -> int:
        if item.content % 10 == 0:
            raise InputError("a multiple of 10")
        return int(item.content) * 2

    def start(self, item: Item, prepared: int) -> None:
        assert prepared == 2 * item.index
        if item.index % 11 == 0:
            raise InputError("a multiple of 11")
        self._running.append(item.index)
        self.started.append(item.index)
        assert len(self._running) <= self.capacity
        self.most_ahead = max(self.most_ahead, self._source.num_read - min(self._running))

    def finished(self) -> list[Finished]:
        self._left -= 1
        if self._left == 0:
            raise EngineError("a worker died")
        # The first that runs takes long: others pass it.
        index = self._chance.choice(self._running[1:] or self._running)
        self._running.remove(index)
        return [Finished(index, self._outcome(index))]

    def _outcome(self, index: int) -> dict[str, Any] | SpanwiseError:
        return InputError("a multiple of 13") if index % 13 == 0 else {"doubled": 2 * index}

    def error_record(self, item: Item, error: SpanwiseError) -> dict[str, Any]:
        return {"index": item.index, "error": f"{item.name} is {error}"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def is_bad(index: int) -> bool:
    return any(index % each == 0 for each in (10, 11, 13))


def check(folder: Path, num_items: int) -> None:
    good = [{"doubled": 2 * i} for i in range(num_items) if not is_bad(i)]
    assert lines(folder / "o") == good
    errors = lines(folder / "o.errors.jsonl")
    assert [each["index"] for each in errors] == list(filter(is_bad, range(num_items)))
    assert errors[1] == {"index": 10, "error": "number 10 is a multiple of 10"}


def job(folder: Path, source: Numbers, task: Doubling, **options: Any) -> tuple[Job, Results]:
    results = Results(folder / "o", {"input": source.extent().digest})
    return Job(source, source.num_items, task, results, **options), results


def test_every_item_ends_in_one_of_the_files_in_order(tmp_path: Path) -> None:
    source, told = Numbers(500), list[JobProgress]()
    task = Doubling(source)
    work, results = job(tmp_path, source, task, told=told.append, num_threads=3)
    end = work.run()
    results.close()
    check(tmp_path, 500)
    num_bad = sum(map(is_bad, range(500)))
    assert end == told[-1] == JobProgress(500, 500, num_bad)
    assert [each.num_done for each in told] == list(range(501))


def test_an_engine_that_fails_ends_the_job_and_the_next_run_goes_on(tmp_path: Path) -> None:
    source, started = Numbers(300), list[int]()
    for _ in range(20):
        task = Doubling(source, breaks_at=23)
        work, results = job(tmp_path, source, task)
        with pytest.raises(EngineError, match="a worker died"):
            work.run()
        results.close()
        started += task.started
        if results.num_done > 250:
            break
    task = Doubling(source)
    work, results = job(tmp_path, source, task)
    work.run()
    results.close()
    check(tmp_path, 300)
    # What had come was not computed again: only what was in flight was.
    assert len(task.started) < 60 and len(started) < 300 + 10 * Doubling.capacity


def test_a_job_that_is_stopped_saves_what_has_come(tmp_path: Path) -> None:
    source, looks = Numbers(200), iter(range(1000))
    task = Doubling(source)
    work, results = job(tmp_path, source, task, stopped=lambda: next(looks) > 40)
    end = work.run()
    results.close()
    assert 0 < end.num_done < 200
    work, results = job(tmp_path, source, Doubling(source))
    assert work.progress == end
    work.run()
    results.close()
    check(tmp_path, 200)


def test_little_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many items there are, also where one takes longer than thousands of others."""
    monkeypatch.setattr("spanwise.jobs.job._MAX_AHEAD", 50)
    source = Numbers(3000)
    task = Doubling(source)
    work, results = job(tmp_path, source, task)
    work.run()
    results.close()
    check(tmp_path, 3000)
    assert task.most_ahead < 50 + 20
