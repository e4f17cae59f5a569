"""A step's section of one lane while it is being written."""

from __future__ import annotations

from spanwise.scheduler.sequence import Sequence
from spanwise.types.plan import NewSequence, Row


class Draft:
    """Rows of step ``step``, of at most ``budget`` tokens more."""

    def __init__(self, step: int, budget: int) -> None:
        self.step = step
        self.budget = budget
        self.new: list[NewSequence] = []
        self.rows: list[Row] = []
        self.num_tokens = 0
        self.num_prefill_tokens = 0

    def names(self, sequence: Sequence) -> bool:
        """Whether the sequence has a row in this step."""
        return sequence.last_step == self.step

    def add(self, sequence: Sequence, room: int) -> None:
        """Plan as many of the ``room`` positions that have a place as the budget allows."""
        count = min(room, self.budget)
        if sequence.is_prefill:
            self.num_prefill_tokens += count
        self.num_tokens += count
        self.budget -= count
        self.rows.append(sequence.next_row(self.step, count))
