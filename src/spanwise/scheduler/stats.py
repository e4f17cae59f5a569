"""What a scheduler has done and has at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from spanwise.scheduler.draft import Draft
from spanwise.scheduler.sequence import Sequence
from spanwise.types.outputs import FinishReason

EndReason = FinishReason | Literal["abort"]


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What is at hand now, and what was done since the scheduler was made, restarts included.

    Blocks are counted per cache group; one that only keeps a prefix for later is not in use.
    ``num_admitted`` counts sequences, not their coming back after a preemption;
    ``num_preemptions`` those for want of blocks.
    ``prefix_queried_tokens`` were looked up at admissions, coming back included, and
    ``prefix_hit_tokens`` of them were found. Planned tokens are decode where their row's input was
    generated, prefill where it was known when the sequence was introduced.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    used_blocks: tuple[int, ...]
    total_blocks: tuple[int, ...]
    num_steps: int
    num_preemptions: int
    num_admitted: int
    finished: dict[EndReason, int]
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    planned_prefill_tokens: int
    planned_decode_tokens: int

    @property
    def num_expired(self) -> int:
        """Sequences whose deadline passed before their first step."""
        return self.finished.get("deadline", 0)


@dataclass
class Tally:
    """What only ever grows."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_admitted: int = 0
    finished: dict[EndReason, int] = field(default_factory=dict)
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    planned_prefill_tokens: int = 0
    planned_decode_tokens: int = 0

    def admitted(self, sequence: Sequence, is_first: bool) -> None:
        """A sequence was introduced, for the first time or anew."""
        self.num_admitted += is_first
        if sequence.may_reuse:
            self.prefix_queried_tokens += len(sequence.tokens)
            self.prefix_hit_tokens += sequence.computed

    def planned(self, draft: Draft) -> None:
        """A step was planned."""
        self.num_steps += 1
        self.planned_prefill_tokens += draft.num_prefill_tokens
        self.planned_decode_tokens += draft.num_tokens - draft.num_prefill_tokens
