"""The executor of one rank in this very process: no child, no channel."""

from __future__ import annotations

import gc
import mmap
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from spanwise.errors import SpanwiseError
from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.worker import ShardSpec, WorkerSpec
from spanwise.worker.entries import Entries, LoadedShard, StepRunner, resolve, set_threads
from spanwise.worker.failure import error_of, failure_of
from spanwise.worker.names import shard_name, worker_name


def load_in_process(spec: ShardSpec, entries: Entries | None = None) -> LoadedShard:
    """Load a whole model into this process. Raises ModelError."""
    assert spec.pp_size == spec.tp_size == 1
    with _as_reported(f"loading {shard_name(spec)} of {spec.folder}"):
        shard: LoadedShard = resolve((entries or Entries()).load)(spec)
    return shard


class InProcessExecutor:
    """Runs a step here each time results are asked for, one step a call, the oldest first.

    Leaves the process's affinity alone, unlike a worker; the number of threads is set.
    """

    def __init__(
        self, shard: LoadedShard, spec: WorkerSpec, arena_bytes: int, entries: Entries | None = None
    ) -> None:
        from spanwise.comm.communicator import RankComm  # both import torch, as the shard has
        from spanwise.comm.single import SingleCommunicator

        self._name = worker_name(spec)
        self._plans: deque[StepPlan] = deque()
        self._failure: SpanwiseError | None = None
        self._wake_read, self._wake_write = os.pipe()
        set_threads(spec.device.threads)
        runner = resolve((entries or Entries()).runner)
        with _as_reported(f"{self._name} starting"):
            arena = mmap.mmap(-1, arena_bytes) if arena_bytes else bytearray()
            comm = RankComm(tp=SingleCommunicator())
            self._runner: StepRunner | None = runner(shard, spec, comm, arena)

    def submit(self, plan: StepPlan) -> None:
        """Take a plan; it runs when results are asked for."""
        self._raise_failure()
        if not self._plans:
            os.write(self._wake_write, b"\0")
        self._plans.append(plan)

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """Run the oldest plan, however long it takes; empty when there is none."""
        self._raise_failure()
        if not self._plans:
            return []
        plan = self._plans.popleft()
        if not self._plans:
            os.read(self._wake_read, 1)
        return [self._run(plan)]

    def results(self) -> list[StepResult]:
        """As ``wait``: nobody else would run the plan."""
        return self.wait()

    def fileno(self) -> int:
        """For selectors: readable while plans are waiting."""
        return self._wake_read

    def close(self) -> None:
        """Let the runner and the cache go."""
        if self._runner is not None:
            self._runner = None
            # A model's parts hold one another: without this, weights and cache would stay until
            # something else asks for a collection.
            gc.collect()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _run(self, plan: StepPlan) -> StepResult:
        assert self._runner is not None
        try:
            with _as_reported(f"{self._name} in step {plan.step}"):
                result = self._runner.execute(plan)
        except SpanwiseError as error:
            self._failure = error
            raise
        assert result is not None
        return result

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@contextmanager
def _as_reported(where: str) -> Iterator[None]:
    """Raise what a worker process would have reported."""
    try:
        yield
    except Exception as error:
        raise error_of(failure_of(error, where)) from error
