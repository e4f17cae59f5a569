"""The thread that feeds a model's devices with items, and resolves their futures."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

from spanwise.engine.core import EngineCore
from spanwise.engine.items import Array, to_arrays
from spanwise.engine.launch import ReplicaHandle
from spanwise.errors import DeadlineError, EngineError, ItemError, SpanwiseError, SupersededError
from spanwise.scheduler.item import ItemRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.forward import TensorData

Result = dict[str, Array]

_LONGEST_WAIT_S = 3600.0  # selectors refuse much longer ones


class ItemLoop:
    """Owns a core from its start on; any thread may submit.

    A future is resolved on the loop's thread: with the item's outputs, or with ItemError,
    DeadlineError, SupersededError, or the EngineError that ended everything. Cancelling one that
    waits, or is computed, drops it.
    """

    def __init__(self, core: EngineCore[ItemRequest]) -> None:
        self._core = core
        self._new: deque[tuple[ItemRequest, Future[Result]]] = deque()
        self._unwanted: deque[int] = deque()
        self._stop_with: SpanwiseError | None = None
        self._futures: dict[int, Future[Result]] = {}
        self._failure: SpanwiseError | None = None
        self._lock = threading.Lock()
        self._hearing, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._hearing, selectors.EVENT_READ, self._hear)
        for replica in core.replicas:
            read = partial(self._collect, replica)
            self._selector.register(replica.executor.fileno(), selectors.EVENT_READ, read)
        self._thread = threading.Thread(target=self._run, name="items", daemon=True)
        self._thread.start()

    def submit(self, request: ItemRequest) -> Future[Result]:
        """Queue an item. Raises EngineError where the loop has ended."""
        future: Future[Result] = Future()
        with self._lock:  # what is put in before the end is heard, or failed, by it
            if self._failure is not None:
                raise self._failure
            self._new.append((request, future))
        self._wake()
        return future

    def stop(self, error: SpanwiseError) -> None:
        """End the thread; what has not come fails with ``error``. May be called again."""
        self._stop_with = self._stop_with or error
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _wake(self) -> None:
        with self._lock, suppress(OSError):  # the loop has ended, or there is enough to wake it
            self._waking.send(b"\0")

    # -- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._take(self._core.feed(time.monotonic()))
                for key, _ in self._selector.select(self._patience_s()):
                    key.data()
                    if self._stop_with is not None:  # perhaps by a callback, on this thread
                        raise self._stop_with
        except SpanwiseError as error:
            self._fail(error)
        except BaseException as error:
            self._fail(EngineError(f"the thread that feeds the devices failed: {error!r:.200}"))
            raise
        finally:
            self._selector.close()
            self._hearing.close()
            with self._lock:
                self._waking.close()

    def _patience_s(self) -> float | None:
        wake_at_s = self._core.wake_at_s
        if wake_at_s is None:
            return None
        return min(max(0.0, wake_at_s - time.monotonic()), _LONGEST_WAIT_S)

    def _hear(self) -> None:
        self._hearing.recv(4096)
        while self._new:
            self._add(*self._new.popleft())
        while self._unwanted:
            sequence_id = self._unwanted.popleft()
            if self._futures.pop(sequence_id, None) is not None:
                self._core.end(sequence_id)

    def _collect(self, replica: ReplicaHandle[ItemRequest]) -> None:
        self._take(self._core.collect(replica))

    def _add(self, request: ItemRequest, future: Future[Result]) -> None:
        if future.cancelled():
            return
        self._futures[request.sequence_id] = future
        self._core.add(request, request.cost)
        future.add_done_callback(partial(self._cancelled, request.sequence_id))

    def _cancelled(self, sequence_id: int, future: Future[Result]) -> None:
        """On any thread: somebody has cancelled, or it has been resolved."""
        if future.cancelled():
            self._unwanted.append(sequence_id)
            self._wake()

    def _take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            future = self._futures.pop(update.sequence_id, None)
            if future is None:
                continue  # cancelled while its step ran
            try:
                self._resolve(future, update)
            except InvalidStateError:  # cancelled this moment
                continue

    def _resolve(self, future: Future[Result], update: SequenceUpdate) -> None:
        if update.outputs is not None:
            self._read(future, update.outputs)
        elif update.finish_reason == "error":
            future.set_exception(ItemError(f"the model could not compute it: {update.error}"))
        elif update.finish_reason == "deadline":
            future.set_exception(DeadlineError("the deadline had passed before it was computed"))
        else:
            assert update.finish_reason == "superseded", update
            future.set_exception(SupersededError("a newer item of its stream took its place"))

    def _read(self, future: Future[Result], outputs: tuple[TensorData, ...]) -> None:
        try:
            arrays = to_arrays(outputs)
        except TypeError as error:  # a dtype that numpy does not know
            future.set_exception(ItemError(f"its outputs cannot be had as arrays: {error}"))
        else:
            future.set_result(arrays)

    def _fail(self, error: SpanwiseError) -> None:
        with self._lock:
            self._failure = error
        for future in (*self._futures.values(), *(future for _, future in self._new)):
            if not future.done():
                with suppress(InvalidStateError):  # cancelled this moment
                    future.set_exception(error)
        self._futures.clear()
        self._new.clear()
