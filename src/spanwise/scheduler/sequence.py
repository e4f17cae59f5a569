"""One generated choice of a request (or one pooled prompt) on its way through the scheduler."""

from __future__ import annotations

import sys

from spanwise.scheduler.block_table import BlockTable
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.key_chain import KeyChain, horizon
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.upcoming import UpcomingBlock
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.outputs import FinishReason
from spanwise.types.plan import NewSequence, Row, Sampled, TokenLogprobs


class Sequence:
    """Tokens, how far they are computed, and what of it is in flight.

    ``computed`` counts the positions planned since the last introduction, done or in flight, or
    found computed. ``num_in_flight`` counts planned rows without a result, ``num_sampling`` those
    of them that draw a token. ``end`` is the length once everything in flight has come.
    ``arrival`` is the rank in age. ``limit`` is the length at which the sequence is certain to be
    finished; a pooled prompt counts its result as one token more. ``last_step`` is the step of its
    last row, ``has_begun`` whether it ever had one.
    """

    def __init__(
        self,
        request: SequenceRequest,
        arrival: int,
        limit: int,
        blocks: BlockTable,
        config: SchedulerConfig,
    ) -> None:
        self.request = request
        self.sequence_id = request.sequence_id
        self.arrival = arrival
        self.urgency = (request.priority, arrival)
        self.limit = limit
        self.blocks = blocks
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.is_running = False
        self.has_begun = False
        self.computed = 0
        self.num_in_flight = 0
        self.num_sampling = 0
        self.end = len(self.tokens)
        self.last_step = -1
        self._num_prompt = len(request.prompt_token_ids)
        self._num_introduced = 0
        self._num_prompt_logprobs = 0
        self._num_cached_untold = 0
        self._stop_token_ids = frozenset(request.stop_token_ids)
        self._recompute_lengths = config.recompute_lengths
        self._horizon = sys.maxsize
        self._bound = limit - 1  # the longest that can be computed before it ends or begins anew
        self._registers = config.prefix_caching
        self._full_at = sys.maxsize  # the length at which one block more can be found by its key
        self._chain: KeyChain | None = None

    @property
    def wanted(self) -> int:
        """Positions that can be planned now; 0 when finished but for what is in flight."""
        return self.end - self.computed if self.end <= self._bound else 0

    def room(self) -> int:
        """How many of the wanted positions have a place; lets go of blocks out of reach."""
        return self.blocks.fit(self.computed, self.wanted)

    @property
    def is_outgrown(self) -> bool:
        """Whether what is computed holds only for a shorter sequence."""
        return self._horizon < self.end < self.limit

    @property
    def is_prefill(self) -> bool:
        """Whether what is computed next was known when the sequence was introduced."""
        return self.computed < self._num_introduced

    @property
    def may_reuse(self) -> bool:
        """Whether nothing is asked of the prompt's positions that only computing them gives."""
        scored = self.request.sampling.prompt_logprobs >= 0
        return self._registers and not scored and self.request.task != "pool_mean"

    def reusable_keys(self) -> list[bytes]:
        """Keys of the full blocks that may be found when it is introduced now.

        The last token is always computed: what follows it is wanted.
        """
        if not self.may_reuse:
            return []
        return self._keys(0, (len(self.tokens) - 1) // self.blocks.block_size)

    def upcoming_block(self) -> UpcomingBlock | None:
        """The block to be filled next, where its tokens are known.

        That it will be filled is certain for as long as the sequence runs.
        """
        index = self.computed // self.blocks.block_size
        known = (index + 1) * self.blocks.block_size <= len(self.tokens)
        if not known or not self.wanted or not self._registers:
            return None
        (key,) = self._keys(index, index + 1)
        return UpcomingBlock(index, key, self.request.priority)

    def introduce(self, found: list[bytes]) -> NewSequence:
        """Begin anew, after the blocks found by these keys; nothing may be in flight.

        What is computed from here on holds up to the next length of recomputing.
        """
        assert not self.num_in_flight and not self.computed
        self._set_horizon(horizon(self.end, self._recompute_lengths))
        self.is_running = True
        self.blocks.attach(found)
        self._expect_full_block()
        self.computed = len(found) * self.blocks.block_size
        self._num_introduced = len(self.tokens)
        if not self.has_begun:
            self._num_cached_untold = min(self.computed, self._num_prompt)
        return NewSequence(
            sequence_id=self.sequence_id,
            token_ids=tuple(self.tokens),
            num_prompt=self._num_prompt,
            sampling=self.request.sampling,
            task=self.request.task,
        )

    def next_row(self, step: int, count: int) -> Row:
        """Plan the next ``count`` positions, which must fit into the free blocks."""
        assert 0 < count <= self.wanted
        start, length = self.computed, self.end
        self.computed += count
        sample = self.computed == length
        if sample:
            self.num_sampling += 1
            self.end += 1
        self.num_in_flight += 1
        self.has_begun = True
        self.last_step = step
        new_blocks = self.blocks.extend(self.computed)
        if self.computed >= self._full_at:
            self._register()
        return Row(self.sequence_id, start, count, length, new_blocks, sample)

    def accept(self, row: Row, sampled: Sampled) -> SequenceUpdate | None:
        """Take in the oldest row in flight; None when it brings nothing to tell.

        Also after a preemption: what was in flight then is as good as any other token.
        """
        self.num_in_flight -= 1
        self.num_sampling -= row.sample
        if self.request.task != "generate":
            return self._accept_pooled(sampled) if row.sample else None
        prompt_logprobs = sampled.prompt_logprobs and self._untold(row, sampled.prompt_logprobs)
        if not row.sample:
            return self._scored(prompt_logprobs) if prompt_logprobs else None
        self._append(row, sampled.token_id)
        reason = self._finish_reason()
        return SequenceUpdate(
            sequence_id=self.sequence_id,
            token_ids=(sampled.token_id,),
            logprobs=(sampled.logprobs,) if sampled.logprobs else (),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=sampled.token_id if reason == "stop" else None,
            num_cached_tokens=self._tell_cached(),
        )

    def rewind(self) -> None:
        """Forget what is computed and give the blocks back; tokens stay."""
        self.is_running = False
        self.computed = 0
        self._set_horizon(sys.maxsize)
        self._full_at = sys.maxsize
        self.blocks.release()

    def forget_in_flight(self) -> None:
        """Rewind, and expect no result any more: the ranks that owed them are gone."""
        self.rewind()
        self.num_in_flight = 0
        self.num_sampling = 0
        self.end = len(self.tokens)
        self.last_step = -1

    def _untold(
        self, row: Row, prompt_logprobs: tuple[TokenLogprobs, ...]
    ) -> tuple[TokenLogprobs, ...]:
        """Those of a row's that were not told before a preemption."""
        untold = prompt_logprobs[max(0, self._num_prompt_logprobs - row.start) :]
        self._num_prompt_logprobs += len(untold)
        return untold

    def _scored(self, prompt_logprobs: tuple[TokenLogprobs, ...]) -> SequenceUpdate:
        return SequenceUpdate(
            sequence_id=self.sequence_id,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._tell_cached(),
        )

    def _accept_pooled(self, sampled: Sampled) -> SequenceUpdate:
        return SequenceUpdate(
            sequence_id=self.sequence_id,
            pooled=sampled.pooled,
            finish_reason="stop",
            num_cached_tokens=self._tell_cached(),
        )

    def _tell_cached(self) -> int:
        told, self._num_cached_untold = self._num_cached_untold, 0
        return told

    def _set_horizon(self, length: int) -> None:
        self._horizon = length
        self._bound = min(self.limit - 1, length)

    def _keys(self, first: int, end: int) -> list[bytes]:
        reach = self._horizon if self.is_running else horizon(self.end, self._recompute_lengths)
        if self._chain is None or self._chain.horizon != reach:
            self._chain = KeyChain(self.request.cache_salt, reach, self.blocks.block_size)
        return self._chain.keys(self.tokens, first, end)

    def _register(self) -> None:
        """Let blocks be found that are full by the plans made, once their tokens are known."""
        num_full = min(self.computed, len(self.tokens)) // self.blocks.block_size
        if num_full > self.blocks.num_registered:
            self.blocks.register(self._keys(self.blocks.num_registered, num_full))
            self._expect_full_block()

    def _expect_full_block(self) -> None:
        if self._registers:
            self._full_at = (self.blocks.num_registered + 1) * self.blocks.block_size

    def _append(self, row: Row, token_id: int) -> None:
        assert token_id >= 0, f"sequence {self.sequence_id} wanted a token and got none"
        assert row.start + row.count == len(self.tokens), "a token came out of order"
        self.tokens.append(token_id)
        if self.computed >= self._full_at:
            self._register()

    def _finish_reason(self) -> FinishReason | None:
        if self.tokens[-1] in self._stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
