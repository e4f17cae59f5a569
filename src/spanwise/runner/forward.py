"""One rank's execution of the steps of a forward task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spanwise.comm.communicator import Link, RankComm
from spanwise.errors import EngineError, reason
from spanwise.model.forward_shard import ForwardShard
from spanwise.runner.collate import collate, outputs_of
from spanwise.types.plan import LanePlan, LaneResult, Sampled, StepPlan, StepResult
from spanwise.types.worker import WorkerSpec

if TYPE_CHECKING:
    from spanwise.model.carried import Carried

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)
# What a card raises from then on, whatever it is asked.
_LOST_DEVICE = (torch.AcceleratorError,)
_INT, _FAILED = -1, -2


@dataclass(frozen=True)
class Failure:
    """Why a batch could not be computed."""

    message: str


class ForwardRunner:
    """Runs plans in order on one shard; a step is one forward of a batch of items.

    Every rank has the items' inputs from the plan; what a stage computed for the next goes over
    their link, after a line that says what it is. A batch that the model cannot compute fails, and
    the runner goes on.
    """

    def __init__(
        self, shard: ForwardShard, spec: WorkerSpec, comm: RankComm, device: torch.device
    ) -> None:
        self._shard, self._place, self._comm, self._device = shard, spec.shard, comm, device
        dtype = shard.model.dtype
        self._dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        shard.join(comm.tp)

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one plan; the result on tensor-parallel rank 0 of the last stage, else None."""
        lanes = tuple(self._lane(lane) for lane in plan.lanes)
        if not self._place.is_last or self._place.tp_rank != 0:
            return None
        return StepResult(plan.epoch, plan.step, lanes)

    def _lane(self, lane: LanePlan) -> LaneResult:
        if not lane.rows:
            return LaneResult()
        inbound = self._inbound()
        try:
            given = inbound if isinstance(inbound, Failure) else self._computed(lane, inbound)
        except (EngineError, *_LOST_DEVICE):
            raise
        except Exception as error:  # what the model says to inputs that it cannot take
            given = Failure(reason(error))
        if not self._place.is_last:
            assert self._comm.outbox is not None
            send(self._comm.outbox, given, self._device)
            return LaneResult()
        if self._place.tp_rank != 0:
            return LaneResult()
        if isinstance(given, Failure):
            failed = (Sampled(row.sequence_id, error=given.message) for row in lane.rows)
            return LaneResult(tuple(failed))
        rows = zip(lane.rows, given, strict=True)
        return LaneResult(tuple(Sampled(row.sequence_id, outputs=own) for row, own in rows))

    def _inbound(self) -> list[Carried] | Failure:
        inbox = self._comm.inbox
        return [] if inbox is None else receive(inbox, self._device)

    def _computed(self, lane: LanePlan, inbound: Sequence[Carried]) -> list[Any]:
        """What later stages read; on the last stage each item's outputs."""
        inputs = {new.sequence_id: new.inputs for new in lane.new}
        items = [inputs[row.sequence_id] for row in lane.rows]
        batch = collate(items, self._shard.model.inputs, self._dtype)
        tensors = [tensor.to(self._device) for tensor in batch.tensors]
        given = self._shard.run(batch.names, tensors, inbound)
        if not self._place.is_last or self._place.tp_rank != 0:
            return given
        outputs = [each for each in given if isinstance(each, torch.Tensor)]
        names, lengths_of = self._shard.output_names, self._shard.model.lengths_of
        return list(outputs_of(batch, names, outputs, lengths_of))


def send(link: Link, carried: Sequence[Carried] | Failure, device: torch.device) -> None:
    """Hand tensors and sizes on, after a line that says of each what it is.

    The line: how many numbers follow; then of each its dtype's number, its dims and their sizes,
    or -1 and the number itself. Of a failure: -2 and the bytes of its message.
    """
    line: list[int] = []
    if isinstance(carried, Failure):
        line, carried = [_FAILED, *carried.message.encode()], []
    for each in carried:
        if isinstance(each, torch.Tensor):
            line += [_DTYPES.index(each.dtype), each.dim(), *each.shape]
        else:
            line += [_INT, int(each)]
    link.send(torch.tensor([len(line)], device=device))
    link.send(torch.tensor(line, dtype=torch.int64, device=device))
    for each in carried:
        if isinstance(each, torch.Tensor):
            link.send(each.contiguous())


def receive(link: Link, device: torch.device) -> list[Carried] | Failure:
    """Take in what ``send`` handed on."""
    (length,) = link.recv(torch.empty(1, dtype=torch.int64, device=device)).tolist()
    numbers = link.recv(torch.empty(length, dtype=torch.int64, device=device)).tolist()
    if numbers[:1] == [_FAILED]:
        return Failure(bytes(numbers[1:]).decode())
    line = iter(numbers)
    carried: list[Carried] = []
    for kind in line:
        if kind == _INT:
            carried.append(next(line))
        else:
            shape = [next(line) for _ in range(next(line))]
            carried.append(torch.empty(shape, dtype=_DTYPES[kind], device=device))
    for each in carried:
        if isinstance(each, torch.Tensor):
            link.recv(each)
    return carried
