"""The executor of one replica whose workers are processes of this machine."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from spanwise.errors import CommunicationError, SpanwiseError, WorkerError
from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.worker import DeviceReading
from spanwise.worker.channel import Channel, ChannelClosed, encode
from spanwise.worker.failure import error_of
from spanwise.worker.messages import Done, Execute, Failed, Ping, Pong, Reply

_ROOT_CAUSE_WAIT_S = 0.2


class RankWorker(Protocol):
    """A worker: what errors call it, and how to talk to it."""

    @property
    def name(self) -> str: ...  # noqa: D102 - said above

    @property
    def channel(self) -> Channel[Reply]: ...  # noqa: D102


class RunningReplica(Protocol):
    """The workers of one replica, whoever owns their processes."""

    @property
    def workers(self) -> Sequence[RankWorker]:
        """In the order of ranks."""
        ...

    def explain(self, index: int) -> str:
        """How a worker came to its end."""
        ...

    def close(self, timeout_s: float) -> None:
        """End the workers. May be called again."""
        ...


class LocalProcessExecutor:
    """Sends every plan to all ranks; the one rank that has the result sends it back."""

    def __init__(self, replica: RunningReplica, close_timeout_s: float = 5.0) -> None:
        self._replica = replica
        self._close_timeout_s = close_timeout_s
        self._in_flight: deque[int] = deque()
        self._arrived: list[StepResult] = []
        self._failure: SpanwiseError | None = None
        self._heard_at_s = {worker: time.monotonic() for worker in replica.workers}
        self._readings: dict[RankWorker, DeviceReading] = {}
        self._selector = selectors.EpollSelector()
        for worker in replica.workers:
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def submit(self, plan: StepPlan) -> None:
        """Queue the plan for every rank; what a rank cannot take yet is sent by later calls."""
        self._raise_failure()
        self._in_flight.append(plan.step)
        self._post(encode(Execute(plan)))

    def ping(self) -> None:
        """Have every rank's model thread show that it is not stuck.

        See ``heard_at_s`` and ``readings``.
        """
        self._raise_failure()
        self._post(encode(Ping()))

    @property
    def heard_at_s(self) -> Sequence[tuple[str, float]]:
        """Each rank's name, and when (on the monotonic clock) it was last heard of."""
        return [(worker.name, at_s) for worker, at_s in self._heard_at_s.items()]

    @property
    def readings(self) -> Sequence[DeviceReading | None]:
        """Of each rank's device, what the last answer to a ping said; None before the first."""
        return [self._readings.get(worker) for worker in self._replica.workers]

    def _post(self, frame: bytes) -> None:
        for worker in self._replica.workers:
            try:
                self._watch_writing(worker, not worker.channel.post(frame))
            except ChannelClosed:
                continue  # reading tells why, and raises

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """Wait for results; see Executor."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._serve(0.0)
        while self._in_flight and not self._arrived:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            self._serve(left_s)
        arrived, self._arrived = self._arrived, []
        return arrived

    def results(self) -> list[StepResult]:
        """Give the results that have come."""
        return self.wait(0.0)

    def fileno(self) -> int:
        """For selectors; stands for all ranks."""
        return self._selector.fileno()

    def close(self) -> None:
        """End the replica's workers."""
        self._selector.close()
        self._replica.close(self._close_timeout_s)

    def _serve(self, timeout_s: float | None) -> None:
        """Do what the channels are ready for. Raises the replica's failure."""
        self._raise_failure()
        errors = list(self._errors(timeout_s))
        if errors and all(isinstance(error, CommunicationError) for error in errors):
            errors += self._errors(_ROOT_CAUSE_WAIT_S)  # its neighbour's end may be the reason
        if errors:
            self._failure = min(errors, key=_blame)
            self._raise_failure()

    def _errors(self, timeout_s: float | None) -> Iterator[SpanwiseError]:
        for key, mask in self._selector.select(timeout_s):
            worker: RankWorker = key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    self._watch_writing(worker, not worker.channel.flush())
                yield from self._read(worker)
            except ChannelClosed:
                self._selector.unregister(worker.channel)
                end = self._replica.explain(list(self._replica.workers).index(worker))
                yield WorkerError(f"{worker.name} {end} {self._when()}")

    def _read(self, worker: RankWorker) -> Iterator[SpanwiseError]:
        for reply, _ in worker.channel.arrived():
            if isinstance(reply, Failed):
                self._selector.unregister(worker.channel)
                yield error_of(reply)
                return
            self._heard_at_s[worker] = time.monotonic()
            if isinstance(reply, Pong):
                self._readings[worker] = reply.reading
                continue
            assert isinstance(reply, Done), reply
            step = self._in_flight.popleft()
            assert reply.result.step == step, f"step {reply.result.step} came before {step}"
            self._arrived.append(reply.result)

    def _watch_writing(self, worker: RankWorker, wanted: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        if self._selector.get_key(worker.channel).events != events:
            self._selector.modify(worker.channel, events, worker)

    def _when(self) -> str:
        return f"in step {self._in_flight[0]}" if self._in_flight else "between steps"

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _blame(error: SpanwiseError) -> int:
    """The smaller, the nearer to the cause: who waits in vain only suffers from it."""
    return int(isinstance(error, CommunicationError))
