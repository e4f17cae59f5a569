"""The load itself: requests sent when they are due, answers timed as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter, process_time

import msgspec

from spanwise.bench.answer import Answer, Failure
from spanwise.bench.connection import BrokenResponseError, ConnectError, Origin
from spanwise.bench.record import RequestRecord, Run


class Load:
    """Requests to one server, given as bytes; sends each once.

    The schedule never waits for answers: in an open loop a request is sent when it is due however
    many are unanswered, so that a slow server meets the queue that its users would form.
    """

    def __init__(self, origin: Origin, requests: Sequence[bytes], timeout_s: float) -> None:
        self._origin, self._requests, self._timeout_s = origin, requests, timeout_s
        self._sent_s: list[float] = []
        self._records: list[RequestRecord] = []
        self._num_failed = 0
        self._started = 0.0

    async def run(
        self,
        arrivals_s: Sequence[float] | None,
        concurrency: int | None,
        stop: asyncio.Event | None = None,
    ) -> Run:
        """Send every request, at ``arrivals_s`` or with ``concurrency`` in flight, until ``stop``.

        Requests that have not ended by then are broken off and leave no record.
        """
        self._started, cpu_started = perf_counter(), process_time()
        if arrivals_s is not None:
            loading = asyncio.create_task(self._open_loop(arrivals_s))
        else:
            assert concurrency is not None
            loading = asyncio.create_task(self._closed_loop(concurrency))
        interrupted = await _finished_before(loading, stop)
        return Run(
            num_requests=len(self._requests),
            sent_s=self._sent_s,
            records=sorted(self._records, key=lambda record: record.index),
            wall_s=perf_counter() - self._started,
            cpu_s=process_time() - cpu_started,
            interrupted=interrupted,
        )

    def progress(self) -> str:
        """Say how far it has come."""
        num_ended = len(self._records)
        return (
            f"{num_ended}/{len(self._requests)} ended, {self._num_failed} failed, "
            f"{len(self._sent_s) - num_ended} in flight, {self._now_s():.0f} s"
        )

    async def _open_loop(self, arrivals_s: Sequence[float]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for index, due_s in enumerate(arrivals_s):
                if (wait_s := due_s - self._now_s()) > 0:
                    await asyncio.sleep(wait_s)
                tasks.create_task(self._send(index))

    async def _closed_loop(self, concurrency: int) -> None:
        waiting = iter(range(len(self._requests)))

        async def one_place() -> None:
            for index in waiting:
                await self._send(index)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(one_place())

    async def _send(self, index: int) -> None:
        answer = Answer()
        sent_s = self._now_s()
        self._sent_s.append(sent_s)
        failure = await self._exchange(self._requests[index], answer)
        self._num_failed += failure is not None
        end_s = self._now_s() if failure or answer.last_s is None else answer.last_s - self._started
        times_s = answer.times_s
        for position, time in enumerate(times_s):
            times_s[position] = time - self._started
        self._records.append(
            RequestRecord(
                index=index,
                sent_s=sent_s,
                times_s=times_s,
                end_s=end_s,
                input_tokens=answer.input_tokens,
                output_tokens=answer.output_tokens,
                failure=failure,
            )
        )

    async def _exchange(self, request: bytes, answer: Answer) -> Failure | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                retry_after = await self._origin.exchange(request, answer.feed)
        except TimeoutError:
            return Failure("timeout", f"no whole answer in {self._timeout_s:g} s")
        except ConnectError as error:
            return Failure("connect", str(error))
        except BrokenResponseError as error:
            return Failure("disconnected", str(error))
        failure = answer.failure()
        return failure and msgspec.structs.replace(failure, retry_after=retry_after)

    def _now_s(self) -> float:
        return perf_counter() - self._started


async def _finished_before(loading: asyncio.Task[None], stop: asyncio.Event | None) -> bool:
    """Wait for the load or for the stop; whether it was the stop."""
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loading.done():
        loading.result()
        return False
    loading.cancel()
    await asyncio.wait((loading,))
    return True
