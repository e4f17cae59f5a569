"""From a plan's rows to one step's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from spanwise.device.memory import move_together
from spanwise.model.batch import CacheReads, ChunkRead, DecodeRead, StepBatch
from spanwise.runner.sequences import BlockTables, KnownSequence, SequenceTable
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import Row

MAX_GATHER_SLOTS = 8192  # 32 MiB of bfloat16 in a layer of 8 KV heads of 128
_MIN_FILL = 32
_FILL_SHARE = 8


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


@dataclass(frozen=True)
class _Place:
    """A row's place in the step: its first token, and where its block tables stand."""

    row: Row
    offset: int
    seat: int


class BatchBuilder:
    """Builds a step's tensors for one rank; every rank builds the same ones.

    ``expanded``: the cache groups whose layers expand every row's history themselves, row by row.
    """

    def __init__(
        self, layout: CacheLayout, num_layers: int, device: torch.device, expanded: frozenset[int]
    ) -> None:
        self._windows = [group.window for group in layout.groups]
        self._device, self._expanded = device, expanded
        self._group_of = group_of(layout, num_layers)

    def build(
        self, rows: Sequence[Row], known: SequenceTable, reads_tokens: bool
    ) -> tuple[StepBatch, list[WantedLogits]]:
        """``reads_tokens``: whether the rank embeds token ids; others need only their number."""
        token_ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        seats: list[int] = []
        places: list[_Place] = []
        sequences = [known[row.sequence_id] for row in rows]
        offset = 0
        for row, sequence in zip(rows, sequences, strict=True):
            end = row.start + row.count
            if reads_tokens:
                token_ids += sequence.token_ids[row.start : end]
            positions += range(row.start, end)
            lengths += [row.length] * row.count
            seats += [sequence.seat] * row.count
            places.append(_Place(row, offset, sequence.seat))
            offset += row.count
        wanted, index = wanted_logits(rows, sequences)
        ids = torch.tensor(token_ids) if reads_tokens else torch.zeros(offset, dtype=torch.long)
        assert ids.shape[0] == offset, "a row reads tokens that are not known"
        at, seat_of = torch.tensor(positions), torch.tensor(seats)
        batch = StepBatch(
            token_ids=ids,
            positions=at,
            lengths=torch.tensor(lengths),
            write_slots=tuple(table.slots(seat_of, at) for table in known.tables),
            reads=tuple(
                self._reads(group, places, offset, table)
                for group, table in enumerate(known.tables)
            ),
            group_of=self._group_of,
            wanted=torch.tensor(index, dtype=torch.long),
        )
        return self._moved(batch), wanted

    def _reads(
        self, group: int, places: Sequence[_Place], num_tokens: int, table: BlockTables
    ) -> CacheReads:
        """Rows of one token together by the length they are filled up to, others by themselves."""
        window = self._windows[group]
        chunks: list[ChunkRead] = []
        filled: dict[int, list[_Place]] = {}
        for place in places:
            row = place.row
            first = max(0, row.start - window + 1) if window else 0
            if row.count == 1 and group not in self._expanded:
                filled.setdefault(filled_length(row.start + 1 - first), []).append(place)
            else:
                slots = table.span(place.seat, first, row.start + row.count)
                chunks.append(ChunkRead(place.offset, row.count, row.start, first, slots))
        decodes = [
            _decode_read(part, length, window, num_tokens, table)
            for length, alike in filled.items()
            for part in _parts(alike, max(1, MAX_GATHER_SLOTS // length))
        ]
        return CacheReads(tuple(chunks), tuple(decodes))

    def _moved(self, batch: StepBatch) -> StepBatch:
        """The batch on the rank's device."""
        if self._device.type == "cpu":
            return batch
        own = [batch.token_ids, batch.positions, batch.lengths, batch.wanted, *batch.write_slots]
        read = [tensor for reads in batch.reads for tensor in _tensors(reads)]
        moved = iter(move_together([*own, *read], self._device))
        ids, positions, lengths, wanted, *write_slots = (next(moved) for _ in own)
        return replace(
            batch,
            token_ids=ids,
            positions=positions,
            lengths=lengths,
            wanted=wanted,
            write_slots=tuple(write_slots),
            reads=tuple(_replaced(reads, moved) for reads in batch.reads),
        )


def filled_length(length: int) -> int:
    """What a row of one token that reads ``length`` slots is filled up to.

    An eighth at most beyond the first few, and a function of the length alone: rows of about one
    length are computed together, and a row is always computed in the same way.
    """
    step = max(_MIN_FILL, (1 << (length - 1).bit_length()) // (2 * _FILL_SHARE))
    return -(-length // step) * step


def _decode_read(
    places: Sequence[_Place], length: int, window: int, num_tokens: int, table: BlockTables
) -> DecodeRead:
    starts = [place.row.start for place in places]
    last = torch.tensor(starts)[:, None]
    first = (last - (window - 1)).clamp_(min=0) if window else torch.zeros_like(last)
    # Beyond its end a row reads its own last position again: nothing of a neighbour's, and nothing
    # that was never written, which might not be a number.
    positions = torch.minimum(first + torch.arange(length), last)
    seats = torch.tensor([place.seat for place in places])[:, None]
    tokens = None
    if len(places) < num_tokens:
        tokens = torch.tensor([place.offset for place in places])
    counts = (last - first + 1).flatten()
    return DecodeRead(tokens, table.slots(seats, positions).flatten(), counts)


def _parts(places: Sequence[_Place], size: int) -> Iterator[Sequence[_Place]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _tensors(reads: CacheReads) -> Iterator[torch.Tensor]:
    for chunk in reads.chunks:
        yield chunk.slots
    for decode in reads.decodes:
        yield from (decode.slots, decode.counts)
        if decode.tokens is not None:
            yield decode.tokens


def _replaced(reads: CacheReads, moved: Iterator[torch.Tensor]) -> CacheReads:
    """``reads`` with the next of ``moved`` for each of ``_tensors(reads)``."""
    chunks = tuple(replace(chunk, slots=next(moved)) for chunk in reads.chunks)
    decodes = []
    for decode in reads.decodes:
        slots, counts = next(moved), next(moved)
        tokens = None if decode.tokens is None else next(moved)
        decodes.append(DecodeRead(tokens, slots, counts))
    return CacheReads(chunks, tuple(decodes))


def group_of(layout: CacheLayout, num_layers: int) -> tuple[int, ...]:
    """The cache group of each layer."""
    of_layer = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}
    return tuple(of_layer[layer] for layer in range(num_layers))


def wanted_logits(
    rows: Sequence[Row], sequences: Sequence[KnownSequence]
) -> tuple[list[WantedLogits], list[int]]:
    """Which tokens' logits are gathered, and who reads which of them."""
    wanted: list[WantedLogits] = []
    index: list[int] = []
    offset = 0
    for row, sequence in zip(rows, sequences, strict=True):
        intro = sequence.intro
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
