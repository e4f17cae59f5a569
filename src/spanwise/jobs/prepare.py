"""Preparing items ahead of the model, on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from spanwise.errors import InputError
from spanwise.jobs.item import Item

Prepared = tuple[Item, Any]
_AHEAD = 4  # items for each thread


def prepared(
    items: Iterable[Item], prepare: Callable[[Item], Any], num_threads: int
) -> Generator[Prepared]:
    """The items in order, each with what was prepared of it, or the InputError that it raised.

    At most a few for each thread are read ahead.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
    waiting: deque[tuple[Item, Future[Any]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) >= _AHEAD * num_threads:
                yield _outcome(*waiting.popleft())
        while waiting:
            yield _outcome(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(item: Item, future: Future[Any]) -> Prepared:
    try:
        return item, future.result()
    except InputError as error:
        return item, error
