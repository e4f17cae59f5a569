"""The policy: which sequences a step computes, and with which blocks. Pure: no clock, no chance."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import asdict
from itertools import chain, islice
from operator import attrgetter

from spanwise.scheduler.batching import BatchGate
from spanwise.scheduler.block_table import BlockTable
from spanwise.scheduler.blocks import BlockPool
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.deadlines import Deadlines
from spanwise.scheduler.draft import Draft
from spanwise.scheduler.key_chain import KeyChain, horizon
from spanwise.scheduler.limit import length_limit
from spanwise.scheduler.queue import WaitingQueue
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.sequence import Sequence
from spanwise.scheduler.service import Service
from spanwise.scheduler.stats import EndReason, SchedulerStats, Tally
from spanwise.scheduler.step_times import StepTimes, rounded_down
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import LanePlan, StepPlan, StepResult

_WATERMARK_SHARE = 100  # admission leaves a hundredth of the blocks to those that run


class Scheduler:
    """One replica's scheduler: sequences in, step plans out, step results in, updates out.

    Plans are to be run in the order given, results to be handed back in that order.

    Of the waiting those with the smallest priority are first; among equals those that were
    preempted, by age, then the tenant with the least service so far, and within it by age. Who is
    first is admitted before any other, but lets others pass while a running sequence is about to
    compute what it can share. Blocks are taken from a running sequence only for a more urgent one
    that runs: of smaller priority, or of the same and older. So none is held up for good by
    those of its own priority or a larger one, and every sequence of the smallest priority ends. A
    larger one is served with what the smaller leave over: as long as they always have something
    waiting, it may wait for ever.
    """

    def __init__(self, config: SchedulerConfig, epoch: int = 0) -> None:
        self._config = config
        self._epoch = epoch
        self._step = 0
        self._num_arrived = 0
        self._pools = tuple(BlockPool(group.num_blocks) for group in config.cache.groups)
        self._sequences: dict[int, Sequence] = {}
        self._service = Service()
        self._waiting = WaitingQueue(self._service)
        self._gate = BatchGate(config)
        self._deadlines = Deadlines()
        self._running: list[Sequence] = []
        self._dropped: list[int] = []
        self._in_flight: deque[StepPlan] = deque()
        self._times = StepTimes(
            config.num_micro_batches, config.min_chunk_tokens, config.max_step_tokens
        )
        self._came_s: float | None = None  # the last result, where another step followed it closely
        self._tally = Tally()

    @property
    def epoch(self) -> int:
        """The epoch that plans carry now."""
        return self._epoch

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """The tokens of those that wait: what their admission will compute, or find."""
        return self._waiting.num_tokens

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
        """Per cache group, the blocks in use; those that only keep a prefix for later are not."""
        return tuple(pool.num_used for pool in self._pools)

    @property
    def num_seats(self) -> int:
        """How many sequences may run at once."""
        return self._config.max_num_seqs

    @property
    def block_size(self) -> int:
        """The tokens of a block, for each of which ``prefix_keys`` has a key."""
        return self._config.cache.block_size

    @property
    def can_start(self) -> bool:
        """Whether there is a place for one sequence more, and blocks for a short one."""
        has_seat = len(self._running) < self._config.max_num_seqs and not self._gate.batch
        return has_seat and all(pool.num_free > self._margin(pool) for pool in self._pools)

    @property
    def num_places(self) -> int:
        """How many sequences more are sure to begin with the next step: one, or none."""
        return int(self.can_start)

    @property
    def wake_at_s(self) -> float | None:
        """When time alone will change something: a batch begins, or a deadline passes."""
        times = (self._gate.opens_at_s, self._deadlines.next_s)
        return min((time for time in times if time is not None), default=None)

    @property
    def stats(self) -> SchedulerStats:
        """What is at hand and what was done."""
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_waiting_tokens=self.num_waiting_tokens,
            used_blocks=self.num_used_blocks,
            total_blocks=tuple(pool.num_blocks for pool in self._pools),
            **asdict(self._tally),
        )

    def check(self, request: SequenceRequest) -> None:
        """Raise InputError for a sequence that could never run here."""
        length_limit(request, self._config)

    def group_of(self, request: SequenceRequest) -> str:
        """None belong together, but by their prefixes."""
        return ""

    def prefix_keys(self, request: SequenceRequest) -> list[bytes]:
        """The keys of the prompt's full blocks, as every replica's cache knows them."""
        tokens, config = request.prompt_token_ids, self._config
        if not config.prefix_caching:
            return []
        bound = horizon(len(tokens), config.recompute_lengths)
        chain = KeyChain(request.cache_salt, bound, self.block_size)
        return chain.keys(tokens, 0, len(tokens) // self.block_size)

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. Raises InputError if it could never run here."""
        assert request.sequence_id not in self._sequences, "a sequence id was used twice"
        limit = length_limit(request, self._config)
        blocks = BlockTable(self._config.cache, self._pools)
        sequence = Sequence(request, self._num_arrived, limit, blocks, self._config)
        self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        self._waiting.add(sequence)
        self._gate.enter(sequence.sequence_id)
        if request.deadline_s is not None:
            self._deadlines.add(sequence.sequence_id, request.deadline_s)

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence and what of it is in flight; no error if it has ended already."""
        self._end_early(sequence_id, "abort")

    def stop(self, sequence_id: int) -> None:
        """Finish a sequence whose caller has seen enough (a stop string); nothing follows of it."""
        self._end_early(sequence_id, "stop")

    def expire(self, now_s: float) -> list[SequenceUpdate]:
        """Drop the sequences whose deadline has come before a step of theirs was planned."""
        expired = self._deadlines.passed(now_s)
        for sequence_id in expired:
            self._finish(self._sequences[sequence_id], "deadline")
        return [SequenceUpdate(sequence_id=i, finish_reason="deadline") for i in expired]

    def withdrawable(self) -> list[int]:
        """Those of which no step was planned, the one to be admitted last first."""
        waiting = [sequence.sequence_id for sequence in self._waiting.fresh()][::-1]
        batch = self._gate.batch or ()
        return sorted(waiting, key=lambda sequence_id: sequence_id in batch)

    def withdraw(self, sequence_id: int) -> SequenceRequest | None:
        """Take back a sequence to run it elsewhere; None if it has begun or ended."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.has_begun:
            return None
        self._forget(sequence)
        return sequence.request

    def next_plan(self, now_s: float = 0.0) -> StepPlan | None:
        """Plan the next step; None when the window is full or all waits on steps in flight.

        Never None while nothing is in flight and a sequence is unfinished, unless all unfinished
        ones wait for a batch to begin: see ``wake_at_s``. ``now_s`` is on any clock, and only
        looked at where batches are formed.
        """
        self._gate.look(now_s, self._waiting)
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        self._preempt_outgrown()
        draft = Draft(self._step, self._config.max_step_tokens)
        self._plan_decodes(draft, steps_apart=self._config.num_micro_batches)
        draft.budget = min(draft.budget, self._prefill_share(len(draft.rows)))
        self._plan_chunks(draft)
        self._admit(draft)
        if not draft.rows:
            # Fewer sequences than stages: the first stage then waits for the token, which reaches
            # it sooner than a plan made after the engine has seen that token.
            self._plan_decodes(draft, steps_apart=1)
        return self._emit(draft) if draft.rows else None

    def accept(self, result: StepResult, now_s: float | None = None) -> list[SequenceUpdate]:
        """Take in the oldest step in flight. What an older epoch gave is dropped.

        ``now_s``, on any clock: when it came. On a pipeline chunks are sized by that.
        """
        assert result.epoch <= self._epoch, "a result came from an epoch yet to begin"
        if result.epoch < self._epoch:
            return []
        plan = self._in_flight.popleft()
        assert plan.step == result.step, f"step {result.step} came before step {plan.step}"
        if now_s is not None and self._config.num_micro_batches > 1:
            self._measure(plan, now_s)
        updates: list[SequenceUpdate] = []
        for lane, outcome in zip(plan.lanes, result.lanes, strict=True):
            for row, sampled in zip(lane.rows, outcome.sampled, strict=True):
                assert row.sequence_id == sampled.sequence_id, "results came in another order"
                sequence = self._sequences.get(row.sequence_id)
                update = sequence.accept(row, sampled) if sequence else None
                if sequence and update:
                    updates.append(update)
                    self._service.charge(sequence.request.tenant, len(update.token_ids))
                    if update.finish_reason:
                        self._finish(sequence, update.finish_reason)
        return updates

    def restart(self, epoch: int) -> None:
        """Begin a new epoch: ranks know nothing, all in flight is lost, steps count from 0.

        Running sequences are computed anew from their accepted tokens, before those that wait.
        """
        assert epoch > self._epoch, f"epoch {epoch} does not follow epoch {self._epoch}"
        self._epoch = epoch
        self._step = 0
        self._in_flight.clear()
        self._came_s = None
        self._dropped.clear()
        for sequence in self._sequences.values():
            sequence.forget_in_flight()
        for sequence in self._running:
            self._waiting.add(sequence)
        self._running.clear()
        for pool in self._pools:
            pool.forget()

    # Planning, in the order of `next_plan`.

    def _preempt_outgrown(self) -> None:
        if not self._config.recompute_lengths:
            return
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
        for sequence in sorted(ready, key=attrgetter("last_step")):
            if len(draft.rows) == quota or not draft.budget:
                return
            if sequence.is_running and (room := self._make_room(sequence, draft)):
                draft.add(sequence, room)

    def _prefill_share(self, num_decodes: int) -> int:
        """How many prompt tokens one step may take beside its decoding rows.

        On a pipeline a part of what is there to do: idle time at both ends of the work is about
        one chunk's, so taking all at once would keep one stage busy at a time. All tokens of the
        step make a round number, since devices fill others up.
        """
        config = self._config
        if config.num_micro_batches == 1:
            return config.max_step_tokens
        some_waiting = islice(self._waiting, config.max_num_seqs)
        wanted = [s.wanted for s in chain(self._running, some_waiting)]
        chunk = self._times.chunk(sum([count for count in wanted if count > 1]))
        beside = rounded_down(chunk + num_decodes) - num_decodes
        return beside if beside > 0 else chunk

    def _plan_chunks(self, draft: Draft) -> None:
        for sequence in [s for s in self._running if s.wanted > 1]:
            if not draft.budget:
                return
            if sequence.is_running and (room := self._make_room(sequence, draft)):
                draft.add(sequence, room)

    def _admit(self, draft: Draft) -> None:
        """Admit by turn while blocks for all tokens known of the next sequence are free.

        Prompts admitted before have theirs: one that is not through has used up the budget. Who
        would compute again what a running prompt is about to compute lets others pass until it is
        planned, and shares it.
        """
        if not self._has_place(draft):
            return
        upcoming = [block for s in self._running if (block := s.upcoming_block())]
        passed_over: set[int] = set()
        while self._has_place(draft):
            sequence = self._waiting.first(passed_over, self._gate.batch)
            if sequence is None or sequence.num_in_flight:
                return
            keys = sequence.reusable_keys()
            found = keys[: sequence.blocks.match(keys)]
            priority = sequence.request.priority
            if any(b.is_worth_waiting_for(keys, len(found), priority) for b in upcoming):
                passed_over.add(sequence.sequence_id)
                continue
            if not self._can_hold(sequence, found):
                return
            self._begin(sequence, found, draft)
            if block := sequence.upcoming_block():
                upcoming.append(block)

    def _has_place(self, draft: Draft) -> bool:
        has_seat = len(self._running) < self._config.max_num_seqs
        return bool(self._waiting) and draft.budget > 0 and has_seat

    def _begin(self, sequence: Sequence, found: list[bytes], draft: Draft) -> None:
        """Admit a sequence that there is room for; what is found costs its tenant nothing."""
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_urgency)
        is_first = not sequence.has_begun
        draft.new.append(sequence.introduce(found))
        if is_first:
            num_new = len(sequence.tokens) - sequence.computed
            self._service.admit(sequence.request.tenant, num_new)
            self._deadlines.discard(sequence.sequence_id)
        self._tally.admitted(sequence, is_first)
        draft.add(sequence, sequence.room())

    def _emit(self, draft: Draft) -> StepPlan:
        lane = LanePlan(tuple(self._dropped), tuple(draft.new), tuple(draft.rows))
        plan = StepPlan(self._epoch, self._step, (lane,))
        self._dropped.clear()
        self._in_flight.append(plan)
        self._step += 1
        self._tally.planned(draft)
        return plan

    def _measure(self, plan: StepPlan, now_s: float) -> None:
        """Learn what a step took: the time since the result before it, if it was close behind.

        With fewer sequences than stages each decodes once in the time all stages take together.
        """
        (lane,) = plan.lanes
        num_rows, num_tokens = len(lane.rows), sum([row.count for row in lane.rows])
        if self._came_s is not None:
            taken_s = now_s - self._came_s
            if num_tokens == num_rows:
                num_stages = self._config.num_micro_batches
                taken_s *= min(max(1, len(self._running)), num_stages) / num_stages
            self._times.add(num_rows, num_tokens, taken_s)
        self._came_s = now_s if self._in_flight else None

    # Blocks.

    def _can_hold(self, sequence: Sequence, found: list[bytes]) -> bool:
        needed = sequence.blocks.needed(sequence.end, self._config.max_step_tokens, found)
        return all(
            count + self._margin(pool) <= pool.num_free
            for count, pool in zip(needed, self._pools, strict=True)
        )

    def _margin(self, pool: BlockPool) -> int:
        return pool.num_blocks // _WATERMARK_SHARE if self._running else 0

    def _make_room(self, sequence: Sequence, draft: Draft) -> int:
        """Get a place for the sequence's next position: how many have one then, 0 if it must wait.

        Takes it from the least urgent first, never from a more urgent one or one that has its row
        already.
        """
        while not (room := sequence.room()):
            victim = next(s for s in reversed(self._running) if not draft.names(s))
            if victim is sequence:
                return 0
            self._preempt(victim)
            self._tally.num_preemptions += 1
        return room

    # The life of a sequence.

    def _preempt(self, sequence: Sequence) -> None:
        """Drop what is computed of it; it is admitted again by turn, once nothing is in flight."""
        self._running.remove(sequence)
        self._dropped.append(sequence.sequence_id)
        sequence.rewind()
        self._waiting.add(sequence)

    def _end_early(self, sequence_id: int, reason: EndReason) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: EndReason) -> None:
        self._forget(sequence)
        self._tally.finished[reason] = self._tally.finished.get(reason, 0) + 1

    def _forget(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self._running.remove(sequence)
            self._dropped.append(sequence.sequence_id)
        else:
            self._waiting.remove(sequence)
        sequence.rewind()
        self._gate.leave(sequence.sequence_id)
        self._deadlines.discard(sequence.sequence_id)
        del self._sequences[sequence.sequence_id]


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency
