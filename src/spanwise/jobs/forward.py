"""A model that is run by one forward an item, as a task."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from spanwise.engine.item_loop import Result
from spanwise.engine.items import Item as ModelItem
from spanwise.engine.model import Model
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import DeadlineError, InputError, SpanwiseError, reason
from spanwise.jobs.item import Item, heading
from spanwise.jobs.task import Finished, Record

Prepare = Callable[[Any], ModelItem]
"""From an item's content to what the model takes. Raises InputError."""
Read = Callable[[Result], Record]
"""From a result to what is told of it. Raises InputError."""

_PATIENCE_S = 0.2
_OF_ITS_OWN = (InputError, DeadlineError)


class ForwardTask:
    """Items through a ``Model``; results come in any order."""

    def __init__(self, model: Model, prepare: Prepare, read: Read, capacity: int) -> None:
        self._model, self._prepare, self._read = model, prepare, read
        self.capacity = capacity
        self._ended: SimpleQueue[tuple[Item, Future[Result]]] = SimpleQueue()

    def prepare(self, item: Item) -> ModelItem:
        """See ``Task``."""
        try:
            return self._prepare(item.content)
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror or error}") from error

    def start(self, item: Item, prepared: ModelItem) -> None:
        """See ``Task``."""
        future = self._model.submit(prepared)
        future.add_done_callback(partial(self._end, item))

    def finished(self) -> list[Finished]:
        """See ``Task``."""
        try:
            ended = [self._ended.get(timeout=_PATIENCE_S)]
        except Empty:
            return []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return [self._finished(*each) for each in ended]

    def error_record(self, item: Item, error: SpanwiseError) -> Record:
        """See ``Task``."""
        return {**heading(item), "error": reason(error)}

    def _end(self, item: Item, future: Future[Result]) -> None:
        self._ended.put((item, future))

    def _finished(self, item: Item, future: Future[Result]) -> Finished:
        try:
            told = self._read(future.result())
        except _OF_ITS_OWN as error:
            return Finished(item.index, error)
        return Finished(item.index, {**heading(item), **told})


class Named:
    """Arrays from files, as the model's input of that name."""

    def __init__(self, name: str, read: Callable[[Path], Any]) -> None:
        self._name, self._read = name, read

    def __call__(self, path: Path) -> ModelItem:
        """See ``Prepare``."""
        return {self._name: self._read(path)}


class Texts:
    """One text of a row, as token ids."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer(folder)

    def __call__(self, row: tuple[Any, ...]) -> ModelItem:
        """See ``Prepare``."""
        if not isinstance(row[0], str):
            raise InputError(f"the model takes a text, got {row[0]!r:.80}")
        return {"input_ids": np.array(self._tokenizer.encode(row[0]), np.int64)}


def numbers(row: tuple[Any, ...]) -> ModelItem:
    """The numbers of a row as one array: those of a list where one column holds it.

    Texts (all of CSV is text) are read as decimal numbers.
    """
    values = row[0] if len(row) == 1 and isinstance(row[0], list) else list(row)
    try:
        array = np.array(_numbers(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"the row is no array of numbers: {values!r:.80}") from error
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return value if isinstance(value, int | float) else float(value)
