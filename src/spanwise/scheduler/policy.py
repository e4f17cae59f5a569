"""What an engine asks of whoever plans the steps of one replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from spanwise.scheduler.stats import SchedulerStats
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import StepPlan, StepResult


class Request(Protocol):
    """What is asked for: ``sequence_id`` is never used twice in a policy's life."""

    @property
    def sequence_id(self) -> int: ...  # noqa: D102 - said above


RequestType = TypeVar("RequestType", bound=Request)


class Policy(Protocol[RequestType]):
    """Requests in, step plans out, step results in, updates out; pure, see ``Scheduler``."""

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing is planned, or all is to be planned anew."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet answered."""
        ...

    @property
    def num_seats(self) -> int:
        """How many requests may run at once."""
        ...

    @property
    def block_size(self) -> int:
        """How many tokens a key of ``prefix_keys`` stands for."""
        ...

    @property
    def num_places(self) -> int:
        """How many requests more would be planned with the next step."""
        ...

    @property
    def wake_at_s(self) -> float | None:
        """When time alone will change something."""
        ...

    @property
    def stats(self) -> SchedulerStats:
        """What is at hand and what was done."""
        ...

    def check(self, request: RequestType) -> None:
        """Raise InputError for a request that could never run."""
        ...

    def group_of(self, request: RequestType) -> str:
        """What it belongs with, so that one replica has them all; "" for nothing."""
        ...

    def prefix_keys(self, request: RequestType) -> list[bytes]:
        """The keys of what may be found computed, one for each full block from the beginning."""
        ...

    def add(self, request: RequestType) -> None:
        """Queue a request. Raises InputError if it could never run."""
        ...

    def abort(self, sequence_id: int) -> None:
        """Forget a request and what of it is in flight."""
        ...

    def expire(self, now_s: float) -> list[SequenceUpdate]:
        """Drop what is too late."""
        ...

    def withdrawable(self) -> list[int]:
        """Those of which no step was planned, the one to be planned last first."""
        ...

    def withdraw(self, sequence_id: int) -> RequestType | None:
        """Take back a request to run it elsewhere; None if it has begun or ended."""
        ...

    def next_plan(self, now_s: float = 0.0) -> StepPlan | None:
        """Plan the next step; None when the window is full or all waits."""
        ...

    def accept(self, result: StepResult, now_s: float | None = None) -> Sequence[SequenceUpdate]:
        """Take in the oldest step in flight; what an older epoch gave is dropped."""
        ...

    def restart(self, epoch: int) -> None:
        """Begin a new epoch: ranks know nothing, all in flight is lost."""
        ...
