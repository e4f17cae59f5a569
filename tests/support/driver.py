"""Requests through a replica, step by step, so that a test can interfere between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from tests.support.replica import Replica

from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.cache import CacheLayout


def drive(
    replica: Replica,
    requests: Sequence[SequenceRequest],
    between: Callable[[int], None] = lambda _: None,
) -> dict[int, list[SequenceUpdate]]:
    """Every sequence's updates. ``between(round)`` is called where nothing is in flight."""
    for request in requests:
        replica.scheduler.add(request)
    updates: dict[int, list[SequenceUpdate]] = {request.sequence_id: [] for request in requests}
    round_ = 0
    while replica.scheduler.num_waiting or replica.scheduler.num_running:
        plans = []
        while (plan := replica.scheduler.next_plan()) is not None:
            plans.append(plan)
        for result in replica._execute(plans):
            for update in replica.scheduler.accept(result):
                updates[update.sequence_id].append(update)
        between(round_)
        round_ += 1
    return updates


def tokens_of(updates: Sequence[SequenceUpdate]) -> list[int]:
    """The tokens that came."""
    return [token for update in updates for token in update.token_ids]


def give_few_blocks(replica: Replica, num_blocks: int) -> None:
    """Let the scheduler use so few of the cache's blocks that sequences make way for others."""
    groups = tuple(
        msgspec.structs.replace(group, num_blocks=num_blocks) for group in replica.cache.groups
    )
    cache = CacheLayout(replica.cache.block_size, groups)
    replica.scheduler = Scheduler(msgspec.structs.replace(replica.scheduler._config, cache=cache))
