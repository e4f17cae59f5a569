"""The running replicas as one: sequences in, updates out, plans and results in between."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Sequence
from typing import Generic

from spanwise.control.router import ReplicaQueue, Router
from spanwise.engine.launch import ReplicaHandle
from spanwise.scheduler.policy import RequestType
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import StepPlan, StepResult


class EngineCore(Generic[RequestType]):
    """Feeds every replica and gathers what comes back; knows tokens, no text.

    For one thread at a time. What a replica raises, its methods raise.
    """

    def __init__(
        self,
        replicas: Sequence[ReplicaHandle[RequestType]],
        planned: Callable[[int, StepPlan, float], None] = lambda replica, plan, now_s: None,
    ) -> None:
        """``planned(replica, plan, now_s)`` is told of every step before it is submitted."""
        self.replicas = tuple(replicas)
        self._planned = planned
        self._router = Router(len(replicas), self.replicas[0].scheduler.block_size)
        # Those whose sequences have changed since they were last fed; results feed theirs at once.
        self._changed: set[ReplicaHandle[RequestType]] = set()
        self._selector = selectors.DefaultSelector()
        for replica in self.replicas:
            self._selector.register(replica.executor.fileno(), selectors.EVENT_READ, replica)

    @property
    def wake_at_s(self) -> float | None:
        """When time alone will give ``feed`` something to do."""
        times = [replica.scheduler.wake_at_s for replica in self.replicas]
        return min((time_s for time_s in times if time_s is not None), default=None)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet answered, of all replicas."""
        return sum(replica.scheduler.num_in_flight for replica in self.replicas)

    @property
    def num_seats(self) -> int:
        """How many sequences all replicas together may run at once."""
        return sum(replica.scheduler.num_seats for replica in self.replicas)

    def add(self, request: RequestType, num_tokens: int) -> int:
        """Queue a sequence that may need so many tokens; give the replica it waits at for now.

        ``sequence_id`` is never used twice. Raises InputError if it could never run.
        """
        scheduler = self.replicas[0].scheduler
        scheduler.check(request)
        prefix = scheduler.prefix_keys(request) if len(self.replicas) > 1 else []
        group = scheduler.group_of(request)
        replica = self._router.assign(request.sequence_id, num_tokens, prefix, group)
        try:
            self.replicas[replica].scheduler.add(request)
        except BaseException:
            self._router.release(request.sequence_id)
            raise
        self._changed.add(self.replicas[replica])
        return replica

    def end(self, sequence_id: int) -> None:
        """Forget a sequence whose caller wants no more of it; it must not have ended itself."""
        replica = self.replicas[self._router.replica_of(sequence_id)]
        replica.scheduler.abort(sequence_id)
        self._router.release(sequence_id)
        self._changed.add(replica)

    def feed(self, now_s: float) -> list[SequenceUpdate]:
        """Send every plan that can be made now; give what time alone has ended."""
        ended = []
        for replica in self.replicas:
            wake_at_s = replica.scheduler.wake_at_s
            if wake_at_s is not None and wake_at_s <= now_s:
                ended += replica.scheduler.expire(now_s)
                self._changed.add(replica)
        for replica in self.replicas:
            if replica in self._changed:
                self._feed(replica, now_s)
        if self._changed:
            self._level(now_s)
        self._changed.clear()
        for update in ended:
            self._router.release(update.sequence_id)
        return ended

    def wait(self) -> list[SequenceUpdate]:
        """Wait for results, and give what they bring; nothing when nothing is in flight."""
        busy = [replica for replica in self.replicas if replica.scheduler.num_in_flight]
        if not busy:
            return []
        if len(self.replicas) == 1:  # which may compute in this process, while it is waited for
            return self._accept(busy[0], busy[0].executor.wait())
        ready = [key.data for key, _ in self._selector.select()]
        return [update for replica in ready for update in self.collect(replica)]

    def collect(self, replica: ReplicaHandle[RequestType]) -> list[SequenceUpdate]:
        """Give what the results that have come from one replica bring."""
        return self._accept(replica, replica.executor.results())

    def close(self) -> None:
        """Let the replicas go; they are the caller's to close."""
        self._selector.close()

    def _accept(
        self, replica: ReplicaHandle[RequestType], results: Sequence[StepResult]
    ) -> list[SequenceUpdate]:
        brought: list[SequenceUpdate] = []
        for result in results:
            now_s = time.monotonic()
            brought += replica.scheduler.accept(result, now_s)
            # The devices work on while something is made of what came.
            self._feed(replica, now_s)
        finished = [update for update in brought if update.finish_reason is not None]
        for update in finished:
            self._router.release(update.sequence_id)
        if finished:
            self._level(time.monotonic())
        return brought

    def _feed(self, replica: ReplicaHandle[RequestType], now_s: float) -> None:
        while (plan := replica.scheduler.next_plan(now_s)) is not None:
            self._planned(self.replicas.index(replica), plan, now_s)
            replica.executor.submit(plan)

    def _level(self, now_s: float) -> None:
        """Move sequences that wait at a busy replica to one that has nothing waiting."""
        schedulers = [replica.scheduler for replica in self.replicas]
        waiting = [each.num_waiting > 0 for each in schedulers]
        if all(waiting) or not any(waiting):
            return
        targets: dict[int, ReplicaHandle[RequestType]] = {}
        queues = [ReplicaQueue(tuple(s.withdrawable()), s.num_places) for s in schedulers]
        for move in self._router.moves(queues):
            request = schedulers[move.source].withdraw(move.sequence_id)
            assert request is not None, "a sequence that has begun was to be moved"
            self._router.move(move.sequence_id, move.target)
            schedulers[move.target].add(request)
            targets[move.target] = self.replicas[move.target]
        for replica in targets.values():
            self._feed(replica, now_s)
