"""A small scheduler, and steps by hand."""

from __future__ import annotations

from collections.abc import Iterable

from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.scheduler import Scheduler
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.cache import CacheGroup, CacheLayout
from spanwise.types.plan import LaneResult, Sampled, StepPlan, StepResult

VOCAB = 100
EOS = 99


def make_scheduler(num_blocks: int = 100, window: int = 0, **changes: object) -> Scheduler:
    limits = {
        "max_step_tokens": 32,
        "max_num_seqs": 8,
        "max_model_len": 64,
        "vocab_size": VOCAB,
        "cache": CacheLayout(4, (CacheGroup((0,), window, num_blocks),)),
    }
    return Scheduler(SchedulerConfig(**(limits | changes)))  # type: ignore[arg-type]


def add(scheduler: Scheduler, sequence_id: int, num_prompt: int, **changes: object) -> None:
    """Add a sequence whose prompt begins as no other's does, so that nothing is shared."""
    request = {
        "sequence_id": sequence_id,
        "prompt_token_ids": (sequence_id % VOCAB, *(i % 90 + 1 for i in range(1, num_prompt))),
        "stop_token_ids": (EOS,),
    }
    scheduler.add(SequenceRequest(**(request | changes)))  # type: ignore[arg-type]


def add_prompt(
    scheduler: Scheduler, sequence_id: int, prompt: Iterable[int], **changes: object
) -> None:
    """Add a sequence with this prompt."""
    add(scheduler, sequence_id, 0, prompt_token_ids=tuple(prompt), **changes)


def plan(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    made = scheduler.next_plan(now_s)
    assert made is not None
    return made


def begun(made: StepPlan) -> list[int]:
    """The sequences introduced."""
    return [new.sequence_id for new in made.lanes[0].new]


def rows(made: StepPlan) -> list[tuple[int, int, int, int, bool]]:
    """(sequence, start, count, length, sample) of each row."""
    found = made.lanes[0].rows
    return [(r.sequence_id, r.start, r.count, r.length, r.sample) for r in found]


def answer(scheduler: Scheduler, made: StepPlan, token: int = 7) -> list[SequenceUpdate]:
    """Hand back a result in which every sampling row drew ``token``."""
    sampled = tuple(Sampled(r.sequence_id, token if r.sample else -1) for r in made.lanes[0].rows)
    return scheduler.accept(StepResult(made.epoch, made.step, (LaneResult(sampled),)))


def run(scheduler: Scheduler) -> list[StepPlan]:
    """Run one step at a time to the end."""
    plans = []
    while made := scheduler.next_plan():
        plans.append(made)
        answer(scheduler, made)
    return plans
