"""Whether a request may queue, judged before it costs anything."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import msgspec

from spanwise.control.drain import DrainRate
from spanwise.errors import InputError

RefusalKind = Literal["tenant", "server"]

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
# As many as there are seats, and at least so many, may wait however long it takes: clients that
# take turns, and are a few too many, are no overload.
MIN_QUEUE = 16
# Once more than that have come, until nobody has been refused for so long, nobody waits like that:
# with a queue that is always full, whoever is admitted waits for nothing.
CALM_S = 0.5


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait; None is no limit.

    Waiting are requests of which no step has begun. ``max_requests_per_tenant`` counts those that
    run too; requests that name no tenant are one tenant's. ``max_queue_delay_s``: once as many
    sequences are there as can run at once, how long one more may expect to wait for a place. It is
    held while more come than can be served; before that, once as many may wait as can run.
    Raises InputError for a limit under which nothing could be admitted.
    """

    max_waiting_requests: int = 1024
    max_waiting_tokens: int | None = None
    max_requests_per_tenant: int | None = None
    max_queue_delay_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could ever be admitted."""
        for name in ("max_waiting_requests", "max_waiting_tokens", "max_requests_per_tenant"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; raise it")
        if self.max_queue_delay_s is not None and not self.max_queue_delay_s >= 0:
            raise InputError(f"max_queue_delay must be 0 s or more, got {self.max_queue_delay_s}")


class Refusal(msgspec.Struct, frozen=True):
    """Why a request is not taken: its tenant has enough (HTTP 429), or the server (HTTP 503).

    ``retry_after_s``, from 1 to 60, is when there may be room; the message says where that is no
    more than a guess. ``for_all``: whoever came at that moment would have been refused.
    """

    kind: RefusalKind
    message: str
    retry_after_s: float
    for_all: bool = False


@dataclass
class _Admitted:
    tenant: str
    num_tokens: int
    num_sequences: int = 1
    is_waiting: bool = True


class Admission:
    """Counts what waits and what runs, and refuses what would be too much.

    A request larger than ``max_waiting_tokens`` is admitted when nothing else waits: no request is
    impossible by these limits alone (whether the model can hold it is the scheduler's to say).
    A true count above the estimate is kept, and may lift the sum over the limit; then nothing is
    admitted until it is below again. Times are seconds on any clock that never goes back.

    ``num_seats`` is how many sequences can run at once; None where that is not known, and then
    nobody is refused for the time to wait. With a short ``max_queue_delay_s`` those who are
    admitted under overload see the server that ``num_seats`` clients would see who take turns,
    however many come.
    """

    def __init__(self, limits: AdmissionLimits, num_seats: int | None = None) -> None:
        self.num_seats = num_seats
        self._limits = limits
        self._requests: dict[int, _Admitted] = {}
        self._per_tenant: Counter[str] = Counter()
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._num_sequences = 0
        self._now_s: float | None = None
        # Under load the server is as fast as it gets; a tenant may be refused without any load.
        self._drain_under_load = DrainRate()
        self._drain_when_full = DrainRate()
        self._calm_at_s = -math.inf
        self._drain = DrainRate()

    @property
    def num_requests(self) -> int:
        """Requests admitted and not released."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests admitted of which no step has begun."""
        return self._num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        """The tokens of those that wait, estimated where the count is not known."""
        return self._num_waiting_tokens

    def admit(
        self,
        request_id: int,
        tenant: str,
        estimated_tokens: int,
        now_s: float,
        is_further: bool = False,
    ) -> Refusal | None:
        """Queue a request, or say why not; one refused leaves no trace.

        ``is_further``: it is a part of what another began that was admitted, and is not refused
        for the time it will have to wait.
        """
        assert request_id not in self._requests, "a request id was used twice"
        assert estimated_tokens >= 0
        self._advance(now_s)
        refusal = self._judge_tenant(tenant) or self._judge_server(estimated_tokens)
        if refusal is None and not is_further:
            refusal = self._judge_delay(now_s)
        if refusal is None:
            self._requests[request_id] = _Admitted(tenant, estimated_tokens)
            self._per_tenant[tenant] += 1
            self._num_waiting += 1
            self._num_waiting_tokens += estimated_tokens
            self._num_sequences += 1
        return refusal

    def settle(self, request_id: int, num_tokens: int, num_sequences: int = 1) -> None:
        """The request's true counts are known; harmless for one released."""
        assert num_tokens >= 0 and num_sequences >= 1
        request = self._requests.get(request_id)
        if request is not None:
            if request.is_waiting:
                self._num_waiting_tokens += num_tokens - request.num_tokens
            self._num_sequences += num_sequences - request.num_sequences
            request.num_tokens, request.num_sequences = num_tokens, num_sequences

    def begun(self, request_id: int, now_s: float) -> None:
        """The request waits no more; harmless when told again, or for one released."""
        self._advance(now_s)
        request = self._requests.get(request_id)
        if request is not None and request.is_waiting:
            self._leave_queue(request)

    def release(self, request_id: int, now_s: float) -> None:
        """The request has ended, or was given up while it waited; harmless when told again."""
        self._advance(now_s)
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        was_full = self._is_full
        self._num_sequences -= request.num_sequences
        self._per_tenant[request.tenant] -= 1
        if not self._per_tenant[request.tenant]:
            del self._per_tenant[request.tenant]
        if request.is_waiting:
            self._leave_queue(request)  # given up: tells nothing about the drain
            return
        self._drain.finish(request.num_tokens)
        if self._num_waiting:
            self._drain_under_load.finish(request.num_tokens)
        if was_full:
            self._drain_when_full.finish(request.num_tokens)

    @property
    def _is_full(self) -> bool:
        return self.num_seats is not None and self._num_sequences >= self.num_seats

    def _leave_queue(self, request: _Admitted) -> None:
        request.is_waiting = False
        self._num_waiting -= 1
        self._num_waiting_tokens -= request.num_tokens

    def _advance(self, now_s: float) -> None:
        passed_s = 0.0 if self._now_s is None else now_s - self._now_s
        assert passed_s >= 0.0, "time went back"
        self._now_s = now_s
        if self._requests:
            self._drain.elapse(passed_s)
        if self._num_waiting:
            self._drain_under_load.elapse(passed_s)
        if self._is_full:
            self._drain_when_full.elapse(passed_s)

    def _judge_tenant(self, tenant: str) -> Refusal | None:
        most, there = self._limits.max_requests_per_tenant, self._per_tenant[tenant]
        if most is None or there < most:
            return None
        what = f"{there} requests of this tenant are under way, max_requests_per_tenant is {most}"
        # One of the tenant's has to end: as if all that are admitted ended alike.
        return _refusal("tenant", what, self._drain, self.num_requests / there, 0)

    def _judge_server(self, num_tokens: int) -> Refusal | None:
        if not self._num_waiting:
            return None
        most_requests, most_tokens = (
            self._limits.max_waiting_requests,
            self._limits.max_waiting_tokens,
        )
        there = self._num_waiting_tokens
        requests_over = self._num_waiting + 1 - most_requests
        tokens_over = 0 if most_tokens is None else there + num_tokens - most_tokens
        if requests_over <= 0 and tokens_over <= 0:
            return None
        if requests_over > 0:
            what = f"{self._num_waiting} requests wait, max_waiting_requests is {most_requests}"
        else:
            what = (
                f"{there} tokens wait and this request adds {num_tokens}, "
                f"max_waiting_tokens is {most_tokens}"
            )
        drain = self._drain_under_load
        # Once nothing waits there is room for any request.
        return _refusal("server", what, drain, max(0, requests_over), min(tokens_over, there))

    def _judge_delay(self, now_s: float) -> Refusal | None:
        limit_s = self._limits.max_queue_delay_s
        if limit_s is None or self.num_seats is None or not self._is_full:
            return None
        # As if the sequences of all that are there ended alike.
        per_sequence = self.num_requests / self._num_sequences
        num_queued = self._num_sequences - self.num_seats
        num_ahead = (num_queued + 1) * per_sequence
        drain = self._drain_when_full
        delay_s = drain.seconds_for(num_ahead, 0)
        # Where nothing is known: at least as long again as has been waited in vain.
        if (drain.busy_s if delay_s is None else delay_s) < limit_s:
            return None
        if now_s >= self._calm_at_s and num_queued < max(self.num_seats, MIN_QUEUE):
            return None
        self._calm_at_s = now_s + CALM_S
        what = (
            f"{self._num_sequences} sequences are there, {self.num_seats} can run at once, and one "
            f"more would wait longer than max_queue_delay {limit_s:g} s"
        )
        refusal = _refusal("server", what, drain, num_ahead, 0)
        return msgspec.structs.replace(refusal, for_all=True)


def _refusal(
    kind: RefusalKind, what: str, drain: DrainRate, num_requests: float, num_tokens: int
) -> Refusal:
    seconds = drain.seconds_for(num_requests, num_tokens)
    # Where nothing is known: as long again as has been waited in vain.
    retry_after_s = min(max(drain.busy_s if seconds is None else seconds, MIN_RETRY_S), MAX_RETRY_S)
    if seconds is None:
        when = "try again later; nothing has finished yet, so how soon is not known"
    else:
        when = f"try again in about {retry_after_s:.0f} s"
    return Refusal(kind, f"{what}; {when}", retry_after_s)
