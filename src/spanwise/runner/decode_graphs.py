"""Decode steps of few shapes, each with memory of its own, so that they can be replayed.

A step in which every row is one token is filled up to a number of rows and a length of history out
of a few; its numbers go to where the recording of that shape reads them, in one copy. Filled rows
repeat the shortest row, bit by bit, its slots included, and what comes of them is cut off.

The slots that a row reads are made on the device, of its blocks: a sixteenth of the bytes for
blocks of 16, and nothing on the host that grows with the length but those. The paged kernel reads
as many of them as count, so a length costs its empty programs only, up to the most splits: hence
lengths in steps of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spanwise.device.graphs import Recorder, Recordings
from spanwise.device.memory import move_into
from spanwise.model.batch import CacheReads, DecodeRead, StepBatch
from spanwise.model.shard import Shard
from spanwise.runner.rows import WantedLogits, group_of, wanted_logits
from spanwise.runner.sequences import BlockTables, SequenceTable
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import Row

MOST_ROWS = 256  # beyond them a step's work takes longer than its launches
LEAST_LENGTH = 512
_LENGTH_FACTOR = 4
_MOST_SLOTS = 1 << 22  # 32 MiB in each of a handful of tensors


@dataclass(frozen=True)
class DecodeShape:
    """What a step is filled up to: rows, and slots that a row reads."""

    rows: int
    length: int


@dataclass(frozen=True)
class StagedStep:
    """A step whose numbers are on their way to where its recording reads them.

    ``shortest``: the row that filled rows repeat.
    """

    shape: DecodeShape
    num_rows: int
    shortest: int
    wanted: list[WantedLogits]


@dataclass(frozen=True)
class _Buffers:
    """What the recording of one shape reads: numbers, and hidden states from the stage before."""

    numbers: torch.Tensor
    inbound: torch.Tensor | None


class DecodeGraphs:
    """Runs decode steps of one shard by recordings."""

    def __init__(
        self,
        shard: Shard,
        layout: CacheLayout,
        max_model_len: int,
        device: torch.device,
        recorder: Recorder,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._shard, self._device, self._max_length = shard, device, max_model_len
        self._block_size = layout.block_size
        self._windows = [group.window for group in layout.groups]
        self._group_of = group_of(layout, shard.spec.num_layers)
        self.recordings: Recordings[DecodeShape] = Recordings(recorder, agree)
        self._buffers: dict[DecodeShape, _Buffers] = {}
        self._out: torch.Tensor | None = None

    def stage(self, rows: Sequence[Row], known: SequenceTable) -> StagedStep | None:
        """Bring a step to the device; None for one that is no decode step or is not recorded."""
        num_rows = len(rows)
        if num_rows > MOST_ROWS or any(row.count != 1 for row in rows):
            return None
        sequences = [known[row.sequence_id] for row in rows]
        wanted, index = wanted_logits(rows, sequences)
        if index != list(range(num_rows)) or any(row.pooled for row in wanted):
            return None
        longest = max(row.start for row in rows) + 1
        shape = DecodeShape(filled_rows(num_rows), filled_history(longest, self._max_length))
        if shape.rows * shape.length > _MOST_SLOTS or not self.recordings.takes(shape):
            return None
        shortest = min(range(num_rows), key=lambda at: rows[at].start)
        order = [*range(num_rows), *[shortest] * (shape.rows - num_rows)]
        ids = [0] * num_rows
        if self._shard.spec.is_first:
            ids = [one.token_ids[row.start] for row, one in zip(rows, sequences, strict=True)]
        positions = torch.tensor([rows[at].start for at in order])
        seats = torch.tensor([sequences[at].seat for at in order])
        tokens = (torch.tensor([ids[at] for at in order]), positions)
        lengths = torch.tensor([rows[at].length for at in order])
        blocks = (
            self._first_slots(window, shape, seats, positions, table)
            for window, table in zip(self._windows, known.tables, strict=True)
        )
        move_into((*tokens, lengths, *blocks), self._buffers_of(shape).numbers)
        return StagedStep(shape, num_rows, shortest, wanted)

    @torch.inference_mode()
    def run(self, staged: StagedStep, inbound: torch.Tensor | None) -> torch.Tensor:
        """As ``Shard.forward``, where every row's logits are wanted; good until the next run."""
        shape, buffers = staged.shape, self._buffers[staged.shape]
        if inbound is not None:
            assert buffers.inbound is not None
            buffers.inbound[: staged.num_rows].copy_(inbound)
            buffers.inbound[staged.num_rows :].copy_(inbound[staged.shortest])
        out = self.recordings.run(shape, lambda: self._forward(shape, buffers))
        return out[: staged.num_rows]

    def drop(self) -> None:
        """Let go of all recordings, and of their memory."""
        self.recordings.drop()
        self._buffers.clear()
        self._out = None

    # -- on the host ------------------------------------------------------------------------------

    def _first_slots(
        self,
        window: int,
        shape: DecodeShape,
        seats: torch.Tensor,
        positions: torch.Tensor,
        table: BlockTables,
    ) -> torch.Tensor:
        """The first slot of each block that a row reads, ``[rows, blocks]``; the last one again."""
        size = self._block_size
        first = _first_position(positions, window) // size
        block = first[:, None] + torch.arange(self._num_blocks(shape, window))
        block = torch.minimum(block, (positions // size)[:, None])
        return table.slots(seats[:, None], block * size)

    def _num_blocks(self, shape: DecodeShape, window: int) -> int:
        width = _width(shape, window)
        # A window may begin at the last position of a block.
        return (width - 2) // self._block_size + 2 if window else -(-width // self._block_size)

    def _buffers_of(self, shape: DecodeShape) -> _Buffers:
        if shape not in self._buffers:
            blocks = sum(self._num_blocks(shape, window) for window in self._windows)
            size = shape.rows * (3 + blocks)
            numbers = torch.zeros(size, dtype=torch.long, device=self._device)
            inbound = None
            if not self._shard.spec.is_first:
                hidden = (shape.rows, self._shard.hidden_size)
                inbound = torch.zeros(hidden, dtype=self._shard.dtype, device=self._device)
            self._buffers[shape] = _Buffers(numbers, inbound)
        return self._buffers[shape]

    # -- on the device: all of this is recorded ---------------------------------------------------

    def _forward(self, shape: DecodeShape, buffers: _Buffers) -> torch.Tensor:
        out = self._shard.forward(self._batch(shape, buffers.numbers), buffers.inbound)
        if self._out is None:
            rows = filled_rows(MOST_ROWS)
            self._out = torch.empty((rows, out.shape[1]), dtype=out.dtype, device=out.device)
        # One place for what all recordings give: else each would keep its own.
        return self._out[: shape.rows].copy_(out)

    def _batch(self, shape: DecodeShape, numbers: torch.Tensor) -> StepBatch:
        rows, at = shape.rows, 3 * shape.rows
        ids, positions, lengths = numbers[:at].view(3, rows)
        write_slots, reads = [], []
        for window in self._windows:
            end = at + rows * self._num_blocks(shape, window)
            slots, write = self._slots(shape, window, numbers[at:end].view(rows, -1), positions)
            counts = positions - _first_position(positions, window) + 1
            reads.append(CacheReads((), (DecodeRead(None, slots.flatten(), counts),)))
            write_slots.append(write)
            at = end
        wanted = torch.arange(rows, device=numbers.device)
        return StepBatch(
            token_ids=ids,
            positions=positions,
            lengths=lengths,
            write_slots=tuple(write_slots),
            reads=tuple(reads),
            group_of=self._group_of,
            wanted=wanted,
        )

    def _slots(
        self, shape: DecodeShape, window: int, blocks: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each row reads, ``[rows, width]``, beyond its end its last again; what it writes."""
        last = positions[:, None]
        first = _first_position(last, window)
        place = torch.arange(_width(shape, window), device=positions.device)
        place = torch.minimum(first + place, last)
        slots = self._slots_at(blocks, first, place)
        return slots, self._slots_at(blocks, first, last)[:, 0]

    def _slots_at(
        self, blocks: torch.Tensor, first: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        size = self._block_size
        return blocks.gather(1, positions // size - first // size) + positions % size


def _first_position(last: torch.Tensor, window: int) -> torch.Tensor:
    return (last - (window - 1)).clamp_(min=0) if window else torch.zeros_like(last)


def _width(shape: DecodeShape, window: int) -> int:
    return min(shape.length, window) if window else shape.length


def filled_rows(num_rows: int) -> int:
    """The next number of rows that steps are recorded for: 1, 2, 4, 8, 16, 24, 32, 40 ...

    From 64 on in steps of 16, then of 32.
    """
    if num_rows <= 4:
        return 1 << (num_rows - 1).bit_length()
    step = max(8, (1 << (num_rows - 1).bit_length()) // 8)
    return -(-num_rows // step) * step


def filled_history(length: int, max_length: int) -> int:
    """The next number of slots that steps are recorded for, never more than any row can read."""
    filled = LEAST_LENGTH
    while filled < length:
        filled *= _LENGTH_FACTOR
    return max(length, min(filled, max_length))
