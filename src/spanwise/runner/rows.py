"""From a plan's rows to one step's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from spanwise.device.memory import move_together
from spanwise.model.batch import CacheReads, RowSpan, StepBatch
from spanwise.runner.sequences import KnownSequence, SequenceTable
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import Row

MAX_GATHER_SLOTS = 8192  # 32 MiB of bfloat16 in a layer of 8 KV heads of 128


@dataclass(frozen=True)
class WantedLogits:
    """Which of the step's gathered logits a row reads.

    ``prompt`` are those after positions whose next token is a prompt token to be scored;
    ``last`` is the one a token is drawn from, -1 for none. ``pooled`` are those whose hidden states
    a pooling sequence takes.
    """

    row: Row
    prompt: range
    last: int
    pooled: range


class BatchBuilder:
    """Builds a step's tensors for one rank; every rank builds the same ones."""

    def __init__(self, layout: CacheLayout, num_layers: int, device: torch.device) -> None:
        self._windows = [group.window for group in layout.groups]
        self._device = device
        of_layer = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}
        self._group_of = tuple(of_layer[layer] for layer in range(num_layers))

    def build(
        self, rows: Sequence[Row], known: SequenceTable, reads_tokens: bool
    ) -> tuple[StepBatch, list[WantedLogits]]:
        """``reads_tokens``: whether the rank embeds token ids; others need only their number."""
        token_ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        spans: list[RowSpan] = []
        offset = 0
        for row in rows:
            end = row.start + row.count
            if reads_tokens:
                token_ids += known[row.sequence_id].token_ids[row.start : end]
            positions += range(row.start, end)
            lengths += [row.length] * row.count
            spans.append(self._span(row, offset))
            offset += row.count
        wanted, index = _wanted(rows, known)
        ids = torch.tensor(token_ids) if reads_tokens else torch.zeros(offset, dtype=torch.long)
        assert ids.shape[0] == offset, "a row reads tokens that are not known"
        batch = StepBatch(
            token_ids=ids,
            positions=torch.tensor(positions),
            lengths=torch.tensor(lengths),
            rows=spans,
            write_slots=self._write_slots(rows, known),
            reads=self._reads(spans, [known[row.sequence_id] for row in rows]),
            group_of=self._group_of,
            wanted=torch.tensor(index, dtype=torch.long),
        )
        return self._moved(batch), wanted

    def _moved(self, batch: StepBatch) -> StepBatch:
        """The batch on the rank's device."""
        if self._device.type == "cpu":
            return batch
        read = [reads.slots for reads in batch.reads]
        rest = [batch.token_ids, batch.positions, batch.lengths, batch.wanted]
        moved = iter(move_together([*rest, *batch.write_slots, *read], self._device))
        ids, positions, lengths, wanted = islice(moved, len(rest))
        return replace(
            batch,
            token_ids=ids,
            positions=positions,
            lengths=lengths,
            wanted=wanted,
            write_slots=tuple(islice(moved, len(batch.write_slots))),
            reads=tuple(replace(r, slots=s) for r, s in zip(batch.reads, moved, strict=True)),
        )

    def _span(self, row: Row, offset: int) -> RowSpan:
        first = tuple(max(0, row.start - w + 1) if w else 0 for w in self._windows)
        return RowSpan(offset, row.count, row.start, first)

    def _reads(
        self, spans: Sequence[RowSpan], sequences: Sequence[KnownSequence]
    ) -> tuple[CacheReads, ...]:
        found = []
        for group in range(len(self._windows)):
            slots = [
                sequence.slots[group][span.first_read[group] : span.start + span.count]
                for span, sequence in zip(spans, sequences, strict=True)
            ]
            found.append(CacheReads(torch.cat(slots), _gathers([len(own) for own in slots])))
        return tuple(found)

    def _write_slots(self, rows: Sequence[Row], known: SequenceTable) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.cat(
                [known[r.sequence_id].slots[group][r.start : r.start + r.count] for r in rows]
            )
            for group in range(len(self._windows))
        )


def _gathers(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring rows that read at most ``MAX_GATHER_SLOTS`` together; a longer row alone."""
    gathers: list[list[int]] = []
    room = 0
    for count in counts:
        if count > room:
            gathers.append([])
            room = MAX_GATHER_SLOTS
        gathers[-1].append(count)
        room -= count
    return tuple(tuple(gather) for gather in gathers)


def _wanted(rows: Sequence[Row], known: SequenceTable) -> tuple[list[WantedLogits], list[int]]:
    """Which tokens' logits are gathered, and who reads which of them."""
    wanted: list[WantedLogits] = []
    index: list[int] = []
    offset = 0
    for row in rows:
        intro = known[row.sequence_id].intro
        scored = 0
        if intro.sampling.prompt_logprobs >= 0:
            scored = max(0, min(row.count, intro.num_prompt - 1 - row.start))
        begin = len(index)
        gathered = row.count if intro.task == "pool_mean" else scored
        index += range(offset, offset + gathered)
        last = -1
        if row.sample:
            if gathered < row.count:
                index.append(offset + row.count - 1)
            last = len(index) - 1
        pooled = range(begin, len(index)) if intro.task == "pool_mean" else range(0)
        if intro.task == "pool_last" and row.sample:
            pooled = range(last, last + 1)
        wanted.append(WantedLogits(row, range(begin, begin + scored), last, pooled))
        offset += row.count
    return wanted, index
