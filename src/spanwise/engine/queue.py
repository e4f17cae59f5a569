"""Any Python callables over devices: whichever is free takes the next."""

from __future__ import annotations

import inspect
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from spanwise.device.devices import parse_devices
from spanwise.errors import DeadlineError, EngineError, InputError
from spanwise.scheduler.work_queue import Work, WorkQueue
from spanwise.types.worker import DeviceSpec
from spanwise.worker.entries import set_threads

Given = TypeVar("Given")
Arguments = ParamSpec("Arguments")


_LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True)
class _Call:
    """What is to be called, and who waits for it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    takes_device: bool
    future: Future[Any]


class Queue:
    """One line of work for several devices, each with a thread that takes the next when it is free.

    So a slow device gets less and none is idle while there is work that it may do::

        with spanwise.Queue(devices="cuda:0,1") as queue:
            futures = [queue.submit(embed, text) for text in texts]   # embed(text, device="cuda:0")
            for future in concurrent.futures.as_completed(futures):
                print(future.result())

    Args:
        devices: as for ``LLM``; None takes all CUDA cards, else the CPU.
        max_pending: how much may wait or run; ``submit`` waits for a place beyond that.

    A CPU device's thread stays on its cores. The calls run in this process: what holds Python's
    lock all the time keeps others from running. For items of a model see ``Model.submit``.
    """

    def __init__(self, devices: str | None = None, *, max_pending: int = 1024) -> None:
        if max_pending < 1:
            raise InputError(f"max_pending must be at least 1, got {max_pending}")
        specs = {str(spec): spec for spec in parse_devices(devices)}
        self.devices = tuple(specs)
        self._max_pending = max_pending
        self._queue = WorkQueue(specs)
        self._calls: dict[int, _Call] = {}
        self._ids = count()
        self._is_closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, args=each, name=f"queue-{each[0]}", daemon=True)
            for each in specs.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        function: Callable[..., Given],
        /,
        *arguments: Any,
        priority: int = 0,
        deadline_ms: float | None = None,
        needs: str = "",
        retries: int = 0,
        **options: Any,
    ) -> Future[Given]:
        """Call ``function(*arguments, **options)`` on the next device that is free.

        A function with an argument ``device`` is given the device's name. ``priority``: the
        smaller, the sooner. ``deadline_ms`` from now: what has not begun by then fails with
        DeadlineError. ``needs``: a device's name or kind ("cuda", "cpu:1"); "" for any.
        ``retries``: how often it is tried again where it raises, on another device if there is one.

        Waits while ``max_pending`` is reached. Raises InputError where no device is what it needs,
        EngineError once the queue is shut down.
        """
        able = [name for name in self.devices if needs in ("", name, name.partition(":")[0])]
        if not able:
            raise InputError(f"no device is {needs!r:.40}; there are {', '.join(self.devices)}")
        if retries < 0:
            raise InputError(f"retries must be at least 0, got {retries}")
        if deadline_ms is not None and not math.isfinite(deadline_ms):
            raise InputError(f"deadline_ms must be a number, got {deadline_ms}")
        deadline_s = None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3
        future: Future[Given] = Future()
        takes = "device" not in options and _takes_device(function)
        with self._changed:
            while len(self._queue) >= self._max_pending and not self._is_closed:
                if threading.current_thread() in self._threads:
                    break  # a call that submits: were it to wait, it might wait for itself
                self._changed.wait()
            if self._is_closed:
                raise EngineError("this queue is shut down; make a new one")
            work_id = next(self._ids)
            self._calls[work_id] = _Call(function, arguments, options, takes, future)
            self._queue.add(
                Work(
                    work_id=work_id,
                    devices=frozenset(able),
                    priority=priority,
                    deadline_s=deadline_s,
                    num_retries=retries,
                )
            )
            self._changed.notify_all()
        future.add_done_callback(lambda ended: self._cancelled(work_id, ended))
        return future

    def shutdown(self, *, cancel: bool = False) -> None:
        """Finish what waits, or ``cancel`` it; return when nothing runs. May be called again."""
        with self._changed:
            self._is_closed = True
            waiting = [call.future for call in self._calls.values()] if cancel else []
            self._changed.notify_all()
        for future in waiting:
            future.cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown(cancel=error is not None)

    # -- the devices' threads --------------------------------------------------------------------

    def _serve(self, name: str, spec: DeviceSpec) -> None:
        if spec.kind == "cpu":
            os.sched_setaffinity(0, spec.cores)  # of this thread alone
        while (pulled := self._pull(name)) is not None:
            if spec.kind == "cpu":
                set_threads(spec.threads)  # again: the call before may have imported torch
            self._run(name, *pulled)
            del pulled  # while it waits for the next, nothing of this one is kept

    def _run(self, name: str, work_id: int, call: _Call) -> None:
        options = call.options | ({"device": name} if call.takes_device else {})
        try:
            given = call.function(*call.arguments, **options)
        except BaseException as error:  # whatever it is, it is the caller's
            self._failed(work_id, call, error)
        else:
            self._end(work_id)
            call.future.set_result(given)

    def _pull(self, name: str) -> tuple[int, _Call] | None:
        """The next call for a device; None when there is none and will be none."""
        while True:
            self._drop_late()
            with self._changed:
                work_id = self._queue.pull(name)
                if work_id is not None:
                    call = self._calls[work_id]
                    if call.future.running() or call.future.set_running_or_notify_cancel():
                        return work_id, call
                    self._forget(work_id)
                    continue
                if self._is_closed and not len(self._queue):
                    return None  # what runs elsewhere may fail, and be tried here
                wake_at_s = self._queue.wake_at_s
                wait_s = _LONGEST_WAIT_S
                if wake_at_s is not None:
                    wait_s = min(max(0.0, wake_at_s - time.monotonic()), wait_s)
                self._changed.wait(wait_s)

    def _drop_late(self) -> None:
        with self._changed:
            late = [self._calls.pop(i) for i in self._queue.late(time.monotonic())]
            if late:
                self._changed.notify_all()
        for call in late:
            if call.future.running() or call.future.set_running_or_notify_cancel():
                call.future.set_exception(DeadlineError("the deadline had passed before it began"))

    def _failed(self, work_id: int, call: _Call, error: BaseException) -> None:
        with self._changed:
            is_tried_again = self._queue.failed(work_id)
            if not is_tried_again:
                del self._calls[work_id]
            self._changed.notify_all()
        if not is_tried_again:
            call.future.set_exception(error)

    def _end(self, work_id: int) -> None:
        with self._changed:
            self._forget(work_id)

    def _forget(self, work_id: int) -> None:
        self._queue.done(work_id)
        del self._calls[work_id]
        self._changed.notify_all()

    def _cancelled(self, work_id: int, future: Future[Any]) -> None:
        """On any thread: it has been resolved, or cancelled while it waited."""
        if not future.cancelled():
            return
        with self._changed:
            if self._queue.cancel(work_id):
                del self._calls[work_id]
                self._changed.notify_all()


def _takes_device(function: Callable[..., Any]) -> bool:
    try:
        return "device" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C have none
        return False
