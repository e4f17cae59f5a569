"""A rank that trusts nothing: runs plans with a cache of its own and refuses what breaks them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from spanwise.scheduler.config import SchedulerConfig
from spanwise.types.plan import (
    LaneResult,
    NewSequence,
    Row,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCAB = 7


def next_token(tokens: list[int]) -> int:
    """The token every layout has to draw after ``tokens``."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


def logprob(tokens: list[int], position: int) -> TokenLogprobs:
    return TokenLogprobs(tokens[position], -float(position), 1)


@dataclass
class KnownSequence:
    """What a rank knows of a sequence; ``prefixes[p]`` stands for all tokens up to position p."""

    new: NewSequence
    tables: list[list[int]]
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    first: int = -1
    computed: int = 0

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(hash((self.prefixes[-1] if self.prefixes else 0, token)))


@dataclass(frozen=True)
class Slot:
    """What a rank wrote at one position of one block: stands for a key and a value.

    They depend on all tokens before and the rotary tables, never on who computed them. Another
    salt's slot must not be read, equal as it may be.
    """

    prefix: int
    num_passed: int
    salt: str


class FakeRank:
    """One rank of an epoch. ``salts`` are those of the sequences by id, "" where not named."""

    def __init__(
        self, config: SchedulerConfig, epoch: int = 0, salts: Mapping[int, str] | None = None
    ) -> None:
        self.config = config
        self.epoch = epoch
        self.salts = salts or {}
        self.num_steps = 0
        self.known: dict[int, KnownSequence] = {}
        self.cache: list[dict[tuple[int, int], Slot]] = [{} for _ in config.cache.groups]

    def run(self, plan: StepPlan) -> StepResult:
        assert (plan.epoch, plan.step) == (self.epoch, self.num_steps)
        self.num_steps += 1
        (lane,) = plan.lanes
        for sequence_id in lane.dropped:
            del self.known[sequence_id]
        for new in lane.new:
            assert new.sequence_id not in self.known
            known = KnownSequence(new, [[] for _ in self.config.cache.groups])
            for token in new.token_ids:
                known.append(token)
            self.known[new.sequence_id] = known
        introduced = {new.sequence_id for new in lane.new}
        self._check_shape(lane.rows, introduced)
        for row in lane.rows:
            self._append_blocks(row)
        self._check_owners(lane.rows, introduced)
        # All rows write before any reads, as in a layer of a model.
        for row in lane.rows:
            self._write(row)
        for row in lane.rows:
            self._read(row)
        sampled = tuple(self._sample(row) for row in lane.rows)
        return StepResult(plan.epoch, plan.step, (LaneResult(sampled),))

    def _check_shape(self, rows: tuple[Row, ...], new: set[int]) -> None:
        assert 0 < sum(row.count for row in rows) <= self.config.max_step_tokens
        named = [row.sequence_id for row in rows]
        assert len(set(named)) == len(named)
        assert new <= set(named)
        assert len(self.known) <= self.config.max_num_seqs
        for row in rows:
            sequence = self.known[row.sequence_id]
            end = row.start + row.count
            assert row.count > 0
            if row.sequence_id in new:
                self._check_beginning(row, sequence)
            assert row.start == sequence.computed, "a gap, or computed twice"
            assert end <= len(sequence.tokens) == row.length, "a token nobody has yet"
            assert row.sample == (end == row.length)
            assert row.length <= self.config.max_model_len

    def _check_beginning(self, row: Row, sequence: KnownSequence) -> None:
        needs_all = sequence.new.sampling.prompt_logprobs >= 0 or sequence.new.task == "pool_mean"
        if needs_all or not self.config.prefix_caching:
            assert row.start == 0
        assert row.start % self.config.cache.block_size == 0
        sequence.first = sequence.computed = row.start

    def _append_blocks(self, row: Row) -> None:
        sequence = self.known[row.sequence_id]
        for index, blocks in enumerate(row.new_blocks):
            assert all(0 <= block < self.config.cache.groups[index].num_blocks for block in blocks)
            sequence.tables[index] += blocks
            num_needed = -(-(row.start + row.count) // self.config.cache.block_size)
            assert len(sequence.tables[index]) == num_needed

    def _check_owners(self, rows: tuple[Row, ...], new: set[int]) -> None:
        """A block that is written is nobody else's, but for who begins with it in this step."""
        starts = {row.sequence_id: row.start for row in rows}
        size = self.config.cache.block_size
        for index, group in enumerate(self.config.cache.groups):
            holders: Counter[int] = Counter()
            for sequence_id, sequence in self.known.items():
                start = starts.get(sequence_id, sequence.computed)
                first = max(0, start - group.window + 1) if group.window else 0
                if sequence_id in new:
                    first = start
                holders.update(sequence.tables[index][first // size :])
            for row in rows:
                written = self.known[row.sequence_id].tables[index][row.start // size :]
                assert all(holders[block] == 1 for block in written), "written by two, or read"

    def _slots(self, row: Row, group: int, position: int) -> tuple[int, int]:
        size = self.config.cache.block_size
        return self.known[row.sequence_id].tables[group][position // size], position % size

    def _expected(self, row: Row, position: int) -> Slot:
        num_passed = sum(row.length > length for length in self.config.recompute_lengths)
        prefix = self.known[row.sequence_id].prefixes[position]
        return Slot(prefix, num_passed, self.salts.get(row.sequence_id, ""))

    def _write(self, row: Row) -> None:
        for group, cache in enumerate(self.cache):
            for position in range(row.start, row.start + row.count):
                cache[self._slots(row, group, position)] = self._expected(row, position)

    def _read(self, row: Row) -> None:
        for index, group in enumerate(self.config.cache.groups):
            first = max(0, row.start - group.window + 1) if group.window else 0
            for position in range(first, row.start + row.count):
                slot = self.cache[index].get(self._slots(row, index, position))
                assert slot == self._expected(row, position), "the cache holds something else"

    def _sample(self, row: Row) -> Sampled:
        sequence = self.known[row.sequence_id]
        sequence.computed += row.count
        end = row.start + row.count
        num_prompt = sequence.new.num_prompt
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if sequence.new.sampling.prompt_logprobs >= 0:
            told = range(row.start + 1, min(end + 1, num_prompt))
            prompt_logprobs = tuple(logprob(sequence.tokens, p) for p in told)
        if not row.sample:
            return Sampled(row.sequence_id, prompt_logprobs=prompt_logprobs)
        if sequence.new.task != "generate":
            return Sampled(row.sequence_id, pooled=(float(next_token(sequence.tokens)),))
        sequence.append(next_token(sequence.tokens))
        drawn = logprob(sequence.tokens, len(sequence.tokens) - 1)
        return Sampled(row.sequence_id, sequence.tokens[-1], drawn, prompt_logprobs)
