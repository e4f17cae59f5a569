"""The policy: which sequences a step computes, and with which blocks. Pure: no time, no chance."""

from __future__ import annotations

from bisect import insort
from collections import deque
from itertools import chain, islice

from spanwise.scheduler.block_table import BlockTable
from spanwise.scheduler.blocks import BlockPool
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.draft import Draft
from spanwise.scheduler.limit import length_limit
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.sequence import Sequence
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import LanePlan, StepPlan, StepResult

_WATERMARK_SHARE = 100  # admission leaves a hundredth of the blocks to those that run


class Scheduler:
    """One replica's scheduler: sequences in, step plans out, step results in, updates out.

    Plans are to be run in the order given, results to be handed back in that order. The oldest
    sequence is never held up by a younger one for good, so every sequence ends:
    waiting and running sequences are kept by age, the head of the waiting is admitted before any
    other, and only a younger sequence is ever preempted.
    """

    def __init__(self, config: SchedulerConfig, epoch: int = 0) -> None:
        self._config = config
        self._epoch = epoch
        self._step = 0
        self._num_arrived = 0
        self._pools = tuple(BlockPool(group.num_blocks) for group in config.cache.groups)
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._dropped: list[int] = []
        self._in_flight: deque[StepPlan] = deque()

    @property
    def epoch(self) -> int:
        """The epoch that plans carry now."""
        return self._epoch

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet answered."""
        return len(self._in_flight)

    @property
    def num_used_blocks(self) -> tuple[int, ...]:
        """Per cache group, the blocks in use."""
        return tuple(pool.num_used for pool in self._pools)

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. Raises InputError if it could never run here."""
        assert request.sequence_id not in self._sequences, "a sequence id was used twice"
        limit = length_limit(request, self._config)
        blocks = BlockTable(self._config.cache, self._pools)
        sequence = Sequence(request, self._num_arrived, limit, blocks)
        self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        self._waiting.append(sequence)

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence and what of it is in flight; no error if it has ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._finish(sequence)

    def stop(self, sequence_id: int) -> None:
        """Finish a sequence whose caller has seen enough (a stop string); nothing follows of it."""
        self.abort(sequence_id)

    def next_plan(self) -> StepPlan | None:
        """Plan the next step; None when the window is full or all waits on steps in flight.

        Never None while nothing is in flight and a sequence is unfinished.
        """
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        self._preempt_outgrown()
        draft = Draft(self._step, self._config.max_step_tokens)
        self._plan_decodes(draft, steps_apart=self._config.num_micro_batches)
        draft.budget = min(draft.budget, self._prefill_share())
        self._plan_chunks(draft)
        self._admit(draft)
        if not draft.rows:
            # Fewer sequences than stages: the first stage then waits for the token, which reaches
            # it sooner than a plan made after the engine has seen that token.
            self._plan_decodes(draft, steps_apart=1)
        return self._emit(draft) if draft.rows else None

    def accept(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in the oldest step in flight. What an older epoch gave is dropped."""
        assert result.epoch <= self._epoch, "a result came from an epoch yet to begin"
        if result.epoch < self._epoch:
            return []
        plan = self._in_flight.popleft()
        assert plan.step == result.step, f"step {result.step} came before step {plan.step}"
        updates: list[SequenceUpdate] = []
        for lane, outcome in zip(plan.lanes, result.lanes, strict=True):
            for row, sampled in zip(lane.rows, outcome.sampled, strict=True):
                assert row.sequence_id == sampled.sequence_id, "results came in another order"
                sequence = self._sequences.get(row.sequence_id)
                update = sequence.accept(row, sampled) if sequence else None
                if sequence and update:
                    updates.append(update)
                    if update.finish_reason:
                        self._finish(sequence)
        return updates

    def restart(self, epoch: int) -> None:
        """Begin a new epoch: ranks know nothing, all in flight is lost, steps count from 0.

        Running sequences are computed anew from their accepted tokens, before those that wait.
        """
        assert epoch > self._epoch, f"epoch {epoch} does not follow epoch {self._epoch}"
        self._epoch = epoch
        self._step = 0
        self._in_flight.clear()
        self._dropped.clear()
        self._running.clear()
        for sequence in self._sequences.values():
            sequence.forget_in_flight()
        self._waiting = deque(sorted(self._sequences.values(), key=_arrival))

    # Planning, in the order of `next_plan`.

    def _preempt_outgrown(self) -> None:
        for sequence in [s for s in self._running if s.is_outgrown]:
            self._preempt(sequence)

    def _plan_decodes(self, draft: Draft, steps_apart: int) -> None:
        """Plan one token each for a micro-batch of decoding sequences, longest unserved first.

        A sequence whose token is still in flight is planned again only ``steps_apart`` steps after
        its last row: on a pipeline earlier rows would make the first stage wait for the last.
        """
        decoding = [s for s in self._running if s.wanted == 1]
        quota = -(-len(decoding) // self._config.num_micro_batches)
        ready = [
            s for s in decoding if not s.num_sampling or draft.step - s.last_step >= steps_apart
        ]
        for sequence in sorted(ready, key=lambda s: s.last_step):
            if len(draft.rows) == quota or not draft.budget:
                return
            if sequence.is_running and self._make_room(sequence, draft):
                draft.add(sequence)

    def _prefill_share(self) -> int:
        """How many prompt tokens one step may take.

        On a pipeline half a micro-batch's share of what is there to do: idle time at both ends of
        the work is about one chunk's, so taking all at once would keep one stage busy at a time.
        """
        config = self._config
        if config.num_micro_batches == 1:
            return config.max_step_tokens
        parts = 2 * config.num_micro_batches
        first_waiting = islice(self._waiting, config.max_num_seqs)
        tokens = sum(s.wanted for s in chain(self._running, first_waiting) if s.wanted > 1)
        return max(config.min_chunk_tokens, -(-tokens // parts))

    def _plan_chunks(self, draft: Draft) -> None:
        for sequence in [s for s in self._running if s.wanted > 1]:
            if not draft.budget:
                return
            if sequence.is_running and self._make_room(sequence, draft):
                draft.add(sequence)

    def _admit(self, draft: Draft) -> None:
        """Admit by age while blocks for all tokens known of the next sequence are free.

        Prompts admitted before have theirs: one that is not through has used up the budget.
        """
        while self._waiting and draft.budget and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            if sequence.num_in_flight or not self._can_hold(sequence):
                return
            self._waiting.popleft()
            insort(self._running, sequence, key=_arrival)
            draft.new.append(sequence.introduce(self._config.recompute_lengths))
            draft.add(sequence)

    def _emit(self, draft: Draft) -> StepPlan:
        lane = LanePlan(tuple(self._dropped), tuple(draft.new), tuple(draft.rows))
        plan = StepPlan(self._epoch, self._step, (lane,))
        self._dropped.clear()
        self._in_flight.append(plan)
        self._step += 1
        return plan

    # Blocks.

    def _can_hold(self, sequence: Sequence) -> bool:
        needed = sequence.blocks.needed(sequence.end, self._config.max_step_tokens)
        return all(
            count + self._margin(pool) <= pool.num_free
            for count, pool in zip(needed, self._pools, strict=True)
        )

    def _margin(self, pool: BlockPool) -> int:
        return pool.num_blocks // _WATERMARK_SHARE if self._running else 0

    def _make_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Get a place for the sequence's next position; False if it has to wait for one.

        Takes it from the youngest first, never from an older one or one that has its row already.
        """
        while sequence.blocks.room(sequence.computed) <= 0:
            victim = next(s for s in reversed(self._running) if not draft.names(s))
            if victim is sequence:
                return False
            self._preempt(victim)
        return True

    # The life of a sequence.

    def _preempt(self, sequence: Sequence) -> None:
        """Drop what is computed of it; it is admitted again by age, once nothing is in flight."""
        self._running.remove(sequence)
        self._dropped.append(sequence.sequence_id)
        sequence.rewind()
        insort(self._waiting, sequence, key=_arrival)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self._running.remove(sequence)
            self._dropped.append(sequence.sequence_id)
        else:
            self._waiting.remove(sequence)
        sequence.rewind()
        del self._sequences[sequence.sequence_id]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
