"""What turns step plans into step results."""

from __future__ import annotations

import selectors
from collections.abc import Sequence
from typing import Protocol

from spanwise.types.plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs the steps of one replica in the order they are submitted. For one thread at a time.

    Every method but ``close`` raises EngineError (WorkerError where a worker died) once the replica
    has failed; nothing but ``close`` is of use then.
    """

    def submit(self, plan: StepPlan) -> None:
        """Take a plan and return at once; any number may be in flight."""
        ...

    def wait(self, timeout_s: float | None = None) -> list[StepResult]:
        """Wait until a result is there; give all there are, in step order, each once.

        Empty when the time is up (None: no limit) or when nothing is in flight.
        """
        ...

    def results(self) -> list[StepResult]:
        """As ``wait``, without waiting."""
        ...

    def fileno(self) -> int:
        """For selectors: readable when ``results`` has something to do."""
        ...

    def close(self) -> None:
        """Give everything back. May be called again."""
        ...


def wait_any(executors: Sequence[Executor], timeout_s: float | None = None) -> list[Executor]:
    """Wait for several replicas at once: those whose ``results`` has something to do."""
    with selectors.DefaultSelector() as selector:
        for executor in executors:
            selector.register(executor.fileno(), selectors.EVENT_READ, executor)
        return [key.data for key, _ in selector.select(timeout_s)]
