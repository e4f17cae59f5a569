"""Any model that is run by one forward an item: the class a script uses."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self

from spanwise.engine.core import EngineCore
from spanwise.engine.forward_launch import ForwardEngineConfig, ForwardLaunch
from spanwise.engine.item_loop import ItemLoop, Result
from spanwise.engine.items import Item, Items, read_example
from spanwise.engine.launch import EnginePlan
from spanwise.errors import EngineError, InputError
from spanwise.layout.request import LayoutRequest
from spanwise.scheduler.item import ItemRequest
from spanwise.worker.supervisor import Supervisor

_WINDOWS = 4  # items read ahead: so many times what all devices work on


class Model:
    """A model spread over devices, run by one forward an item: images, texts, audio, any tensors.

    Args:
        model: a folder of a transformers model, ``spanwise/digits-image``, a name on the hub, or
            ``module:factory``, a callable without arguments that returns a ``torch.nn.Module``.
        devices, tensor_parallel_size, pipeline_parallel_size, data_parallel_size, dtype: as for
            ``LLM``. A pipeline cuts any module, at points that balance the measured times.
        max_batch_size: items computed at once.
        max_delay_ms: how long an item may wait for others to be computed with.
        example: one item, to run the model on before it is cut; for a module that does not say
            itself what it takes, by a method ``example_inputs``.
        progress: called with a line as the start goes on.
        supervisor: processes that several models of this process share; the caller's to shut down.

    Raises InputError (and its kinds ModelError, LayoutError, DeviceError) for what cannot be.
    """

    def __init__(
        self,
        model: str,
        *,
        devices: str | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        dtype: str = "auto",
        max_batch_size: int = 32,
        max_delay_ms: float = 0.0,
        example: Item | None = None,
        progress: Callable[[str], None] | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        config = ForwardEngineConfig(
            model=str(model),
            devices=devices,
            layout=LayoutRequest(
                tensor_parallel_size=tensor_parallel_size,
                pipeline_parallel_size=pipeline_parallel_size,
                data_parallel_size=data_parallel_size,
            ),
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_ms / 1e3,
            example=() if example is None else read_example(example),
        )
        launch = ForwardLaunch(config, progress or (lambda _: None), supervisor)
        replicas = launch.run()
        core = EngineCore(replicas)
        loop = ItemLoop(core)
        # Also when it is forgotten, or the script ends, without a shutdown.
        self._close = weakref.finalize(self, _close_in, os.getpid(), loop, core, launch)
        self._loop, self._plan = loop, launch.plan()
        facts = launch.facts.forward
        assert facts is not None
        self.labels = facts.labels
        self._items = Items(facts.inputs)
        self._window = _WINDOWS * config.max_batch_size * launch.layout.dp * launch.layout.pp
        self._ids = count()

    @property
    def plan(self) -> EnginePlan:
        """What was decided at start: layout and bytes per device."""
        return self._plan

    def __call__(self, item: Item) -> Result:
        """Run one item and wait for its result; see ``submit``."""
        return self.submit(item).result()

    def submit(
        self,
        item: Item,
        *,
        priority: int = 0,
        deadline_ms: float | None = None,
        stream: str = "",
    ) -> Future[Result]:
        """Queue an item; any thread may.

        An item is what the model's forward takes, of one item, without a batch's dim: an array
        (numpy's, torch's), a tuple of arrays, or a dict by the names of the forward's arguments.
        The future's result is a dict of arrays; it may be cancelled.

        ``priority``: the smaller, the sooner; above 0 it is background work, which takes what the
        other leaves. ``deadline_ms`` from now: of several the earliest is first, and one that is
        too late fails with DeadlineError before it costs a step. ``stream``: a newer item of the
        same stream takes the place of one that waits, which fails with SupersededError.

        Raises InputError for an item that cannot be run, EngineError where the model has ended.
        """
        if not isinstance(priority, int) or not isinstance(stream, str):
            raise InputError("priority must be a whole number, and stream a text")
        if deadline_ms is not None and not math.isfinite(deadline_ms):
            raise InputError(f"deadline_ms must be a number, got {deadline_ms}")
        inputs, now_s = self._items.read(item), time.monotonic()
        request = ItemRequest(
            sequence_id=next(self._ids),
            inputs=inputs,
            shape=self._items.shape(inputs),
            cost=self._items.cost(inputs),
            priority=priority,
            deadline_s=None if deadline_ms is None else now_s + deadline_ms / 1e3,
            stream=stream,
        )
        return self._loop.submit(request)

    def map(self, items: Iterable[Item]) -> list[Result]:
        """Run every item; results in input order. See ``imap``."""
        return list(self.imap(items))

    def imap(self, items: Iterable[Item], *, priority: int = 0) -> Iterator[Result]:
        """Run every item; yields results in input order as they come, reading ahead as needed.

        Raises InputError, naming the item by its number, for one that cannot be run.
        """
        waiting: deque[tuple[int, Future[Result]]] = deque()
        try:
            for number, item in enumerate(items):
                if len(waiting) == self._window:
                    yield _result(*waiting.popleft())
                with _naming(number):
                    waiting.append((number, self.submit(item, priority=priority)))
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()

    def shutdown(self) -> None:
        """End every process and give memory back. May be called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Say which item it was that cannot be run."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"item {number}: {error}") from error


def _result(number: int, future: Future[Result]) -> Result:
    with _naming(number):
        return future.result()


def map_items(
    model: str, items: Iterable[Item], *, workers: int | None = None, **options: Any
) -> list[Result]:
    """Run a model on every item, over so many devices; results in input order.

    ``options`` are those of ``Model``. None: all CUDA cards, else one CPU device.
    """
    with Model(model, data_parallel_size=workers, **options) as spread:
        return spread.map(items)


def _close_in(
    pid: int, loop: ItemLoop, core: EngineCore[ItemRequest], launch: ForwardLaunch
) -> None:
    """Close in the process that started; a fork of it owns nothing."""
    if os.getpid() == pid:
        loop.stop(EngineError("this model is shut down; make a new one"))
        core.close()
        launch.close()
