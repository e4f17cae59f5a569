"""One rank's execution of step plans."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from mmap import mmap

import torch

from spanwise.comm.communicator import Communicator, RankComm
from spanwise.device.graphs import recorder_of
from spanwise.device.memory import move_together
from spanwise.model.shard import Shard
from spanwise.runner.cache import attach_stores
from spanwise.runner.constraints import Constraints
from spanwise.runner.decode_graphs import DecodeGraphs
from spanwise.runner.logprobs import prompt_logprobs
from spanwise.runner.rows import BatchBuilder, WantedLogits
from spanwise.runner.sampling import SampleRow, sample
from spanwise.runner.sequences import KnownSequence, SequenceTable
from spanwise.types.plan import (
    LanePlan,
    LaneResult,
    Row,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from spanwise.types.worker import WorkerSpec


@dataclass(frozen=True)
class _AwaitedTokens:
    """Tokens of an earlier step that the last stage sends to the first when it has drawn them.

    They belong to the sequences as they were known then: one that was introduced anew since has
    them among its tokens already.
    """

    step: int
    sequences: tuple[KnownSequence, ...]


class Runner:
    """Runs plans in order on one shard.

    Every rank of a replica executes every plan. The first stage embeds token ids, the last draws
    tokens; with several stages the last hands drawn ids to the first directly, in step order.
    """

    def __init__(
        self,
        shard: Shard,
        spec: WorkerSpec,
        comm: RankComm,
        arena: mmap | memoryview | bytearray | torch.Tensor,
    ) -> None:
        self._shard, self._spec, self._comm = shard, spec, comm
        self._place = spec.shard
        self._device = arena.device if isinstance(arena, torch.Tensor) else torch.device("cpu")
        stores = attach_stores(arena, shard.layer_caches, spec.cache, shard.dtype)
        shard.join(comm.tp, stores)
        self._known = SequenceTable(spec.cache)
        self._constraints = Constraints(spec.shard.folder)
        latent = {layer for layer, own in shard.layer_caches.items() if own.kind == "latent"}
        expanded = frozenset(
            index
            for index, group in enumerate(spec.cache.groups)
            if not latent.isdisjoint(group.layers)
        )
        self._builder = BatchBuilder(spec.cache, spec.shard.num_layers, self._device, expanded)
        self._graphs = _decode_graphs(shard, spec, comm.tp, self._device)
        self._awaited: deque[_AwaitedTokens] = deque()

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one plan; the result on tensor-parallel rank 0 of the last stage, else None."""
        lanes = tuple(self._lane(plan.step, lane) for lane in plan.lanes)
        if not self._place.is_last or self._place.tp_rank != 0:
            return None
        return StepResult(plan.epoch, plan.step, lanes)

    def _lane(self, step: int, lane: LanePlan) -> LaneResult:
        self._known.update(lane)
        if not lane.rows:
            return LaneResult()
        if self._place.is_first:
            self._learn_tokens(step, lane)
        output, wanted = self._forward(lane)
        if not self._place.is_last:
            assert self._comm.outbox is not None
            self._comm.outbox.send(output)
            self._await_tokens(step, lane)
            return LaneResult()
        return self._sample(output, wanted)

    def _forward(self, lane: LanePlan) -> tuple[torch.Tensor, list[WantedLogits]]:
        """What the stage gives, by a recording where there is one."""
        staged = None if self._graphs is None else self._graphs.stage(lane.rows, self._known)
        if self._graphs is not None and staged is not None:
            output = self._graphs.run(staged, self._receive(staged.num_rows))
            return output, staged.wanted
        batch, wanted = self._builder.build(lane.rows, self._known, self._place.is_first)
        return self._shard.forward(batch, self._receive(batch.num_tokens)), wanted

    def _receive(self, num_tokens: int) -> torch.Tensor | None:
        if self._comm.inbox is None:
            return None
        shape, dtype = (num_tokens, self._shard.hidden_size), self._shard.dtype
        return self._comm.inbox.recv(torch.empty(shape, dtype=dtype, device=self._device))

    # -- drawn tokens, from the last stage to the first ------------------------------------------

    def _await_tokens(self, step: int, lane: LanePlan) -> None:
        if self._place.is_first:
            drawing = tuple(self._known[row.sequence_id] for row in lane.rows if self._draws(row))
            if drawing:
                self._awaited.append(_AwaitedTokens(step, drawing))

    def _draws(self, row: Row) -> bool:
        return row.sample and self._known[row.sequence_id].intro.task == "generate"

    def _learn_tokens(self, step: int, lane: LanePlan) -> None:
        """Take in drawn tokens: those the lane's rows read, and those certain to be there.

        A plan is only sent while fewer than ``max_in_flight`` steps are unfinished, so tokens of
        steps that far back have been sent; taking them keeps the link from filling up.
        """
        while self._awaited and (
            self._awaited[0].step <= step - self._spec.max_in_flight or self._lacks_tokens(lane)
        ):
            self._take_tokens(self._awaited.popleft())

    def _lacks_tokens(self, lane: LanePlan) -> bool:
        return any(
            row.start + row.count > len(self._known[row.sequence_id].token_ids) for row in lane.rows
        )

    def _take_tokens(self, awaited: _AwaitedTokens) -> None:
        assert self._comm.tokens is not None
        drawn = torch.empty(len(awaited.sequences), dtype=torch.long, device=self._device)
        self._comm.tokens.recv(drawn)
        for sequence, token_id in zip(awaited.sequences, drawn.tolist(), strict=True):
            sequence.token_ids.append(token_id)

    # -- sampling --------------------------------------------------------------------------------

    def _sample(self, logits: torch.Tensor, wanted: list[WantedLogits]) -> LaneResult:
        drawing = [w for w in wanted if self._draws(w.row)]
        rows = [self._sample_row(w.row, logits.shape[1]) for w in drawing]
        token_ids, logprobs = sample(_picked(logits, [w.last for w in drawing]), rows)
        for w, token_id in zip(drawing, token_ids, strict=True):
            self._known[w.row.sequence_id].token_ids.append(token_id)
        if self._comm.tokens is not None and token_ids:
            self._comm.tokens.send(move_together([torch.tensor(token_ids)], self._device)[0])
        answers = zip(token_ids, logprobs, strict=True)
        drawn = {w.row.sequence_id: a for w, a in zip(drawing, answers, strict=True)}
        results = []
        for w in wanted:
            token_id, token_logprobs = drawn.get(w.row.sequence_id, (-1, None))
            results.append(
                Sampled(
                    w.row.sequence_id,
                    token_id,
                    token_logprobs,
                    self._score_prompt(logits, w),
                    self._pool(w),
                )
            )
        return LaneResult(tuple(results))

    def _sample_row(self, row: Row, vocab_size: int) -> SampleRow:
        sequence = self._known[row.sequence_id]
        end = row.start + row.count
        assert end == len(sequence.token_ids), "a token is drawn that others follow already"
        intro = sequence.intro
        allowed = self._constraints.allowed(sequence, vocab_size)
        return SampleRow(intro.sampling, end, sequence.token_ids, intro.num_prompt, allowed)

    def _score_prompt(
        self, logits: torch.Tensor, wanted: WantedLogits
    ) -> tuple[TokenLogprobs, ...]:
        if not wanted.prompt:
            return ()
        sequence, start = self._known[wanted.row.sequence_id], wanted.row.start
        following = sequence.token_ids[start + 1 : start + 1 + len(wanted.prompt)]
        num_top = sequence.intro.sampling.prompt_logprobs
        return prompt_logprobs(logits[wanted.prompt.start : wanted.prompt.stop], following, num_top)

    def _pool(self, wanted: WantedLogits) -> tuple[float, ...] | None:
        row, pooled = wanted.row, wanted.pooled
        if not pooled:
            return None
        sequence = self._known[row.sequence_id]
        sequence.pool.add(self._shard.last_hidden[pooled.start : pooled.stop])
        if not row.sample:
            return None
        is_mean = sequence.intro.task == "pool_mean"
        return sequence.pool.mean(row.start + row.count if is_mean else 1)


def _decode_graphs(
    shard: Shard, spec: WorkerSpec, tp: Communicator, device: torch.device
) -> DecodeGraphs | None:
    """Recordings for decode steps, on a device that has some use for them."""
    recorder = recorder_of(device)
    if recorder is None or not shard.is_recordable or not _records_collectives(spec):
        return None

    def agree(is_so: bool) -> bool:
        """Whether it is so on every rank of the group."""
        if tp.size == 1:
            return is_so
        (given,) = move_together([torch.tensor([float(is_so)])], device)
        return int(tp.all_reduce(given).item()) == tp.size

    return DecodeGraphs(shard, spec.cache, spec.max_model_len, device, recorder, agree)


def _records_collectives(spec: WorkerSpec) -> bool:
    """Whether the shard's exchanges, if it has any, are the device's own work: those of NCCL."""
    return spec.shard.tp_size == 1 or spec.store_port > 0


def _picked(logits: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Rows of the logits; no copy where it is all of them, as in every step that only decodes."""
    if index == list(range(len(logits))):
        return logits
    (rows,) = move_together([torch.tensor(index, dtype=torch.long)], logits.device)
    return logits[rows]
