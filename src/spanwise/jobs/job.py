"""The loop of a job: items in, what came of them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from spanwise.errors import InputError, SpanwiseError
from spanwise.jobs.item import Item, Source
from spanwise.jobs.prepare import Prepared, prepared
from spanwise.jobs.results import Results
from spanwise.jobs.state import Row
from spanwise.jobs.task import Record, Task

_FLUSH_S = 0.5
_FLUSH_BYTES = 8 << 20
_MAX_AHEAD = 1 << 16  # items that may be done before one that is not: what a restart looks through


@dataclass(frozen=True)
class JobProgress:
    """``num_done`` of ``num_items`` are known, errors included."""

    num_items: int
    num_done: int
    num_errors: int


class Job:
    """Brings every item of a source that is not done through a task, into results.

    Args:
        told: called with the progress, after each change.
        stopped: looked at between items; true ends the run early, with all that has come saved.
        num_threads: threads that prepare items.
    """

    def __init__(
        self,
        source: Source,
        num_items: int,
        task: Task,
        results: Results,
        *,
        told: Callable[[JobProgress], None] = lambda progress: None,
        stopped: Callable[[], bool] = lambda: False,
        num_threads: int = 1,
    ) -> None:
        self._source, self._task, self._results = source, task, results
        self._num_items, self._num_threads = num_items, num_threads
        self._told, self._stopped = told, stopped
        self._running: dict[int, Item] = {}
        self._flushed_s = time.monotonic()
        self._last_index = 0

    @property
    def progress(self) -> JobProgress:
        """How far it is."""
        return JobProgress(self._num_items, self._results.num_done, self._results.num_errors)

    def run(self) -> JobProgress:
        """Run until all is done, or stopped. What has come is saved however it ends."""
        self._told(self.progress)
        items = prepared(self._undone(), self._task.prepare, self._num_threads)
        try:
            while not self._stopped() and (self._fill(items) or self._running):
                for ended in self._task.finished() if self._running else ():
                    self._end(self._running.pop(ended.index), ended.outcome)
                self._flush_if_due()
        finally:
            items.close()
            self._results.flush()
        return self.progress

    def _undone(self) -> Iterator[Item]:
        for item in self._source.items(self._results.written.next_index):
            if not self._results.is_done(item.index):
                yield item

    def _fill(self, items: Iterator[Prepared]) -> bool:
        """Start items up to the task's capacity; whether any came."""
        came = False
        while len(self._running) < self._task.capacity and not self._is_far_ahead():
            if self._stopped() or (found := next(items, None)) is None:
                break
            came = True
            self._start(*found)
            self._flush_if_due()
        return came

    def _is_far_ahead(self) -> bool:
        ahead = self._last_index - self._results.written.next_index
        return bool(self._running) and ahead > _MAX_AHEAD

    def _start(self, item: Item, content: Any) -> None:
        try:
            if isinstance(content, InputError):
                raise content
            self._task.start(item, content)
        except InputError as error:
            self._end(item, error)
        else:
            self._running[item.index] = item
            self._last_index = item.index

    def _end(self, item: Item, outcome: Record | SpanwiseError) -> None:
        failed = isinstance(outcome, SpanwiseError)
        if isinstance(outcome, SpanwiseError):
            outcome = self._task.error_record(item, outcome)
        self._results.add(item.index, Row(failed, msgspec.json.encode(outcome) + b"\n"))
        self._told(self.progress)

    def _flush_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s - self._flushed_s >= _FLUSH_S or self._results.unsaved_bytes >= _FLUSH_BYTES:
            self._results.flush()
            self._flushed_s = time.monotonic()
