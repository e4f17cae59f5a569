"""One rank's part of a model that is run by one forward, loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from spanwise.comm.communicator import Communicator
from spanwise.errors import InputError, ModelError
from spanwise.model.example import ExampleBatch, example_batch
from spanwise.model.exchange import Exchange
from spanwise.model.forward_model import ForwardModel, NamedForward, load_forward_model
from spanwise.types.worker import ShardInfo, ShardSpec

if TYPE_CHECKING:
    from spanwise.model.carried import Carried
    from spanwise.model.pieces import Stage


class ForwardShard:
    """A stage's share of one tensor-parallel rank. ``input_names``: in the order ``run`` takes."""

    def __init__(
        self,
        model: ForwardModel,
        named: NamedForward,
        exchange: Exchange,
        stage: Stage | None,
        spec: ShardSpec,
        replicated: Sequence[str] = (),
    ) -> None:
        self.model, self.spec = model, spec
        self._named, self._exchange, self._stage = named, exchange, stage
        self._replicated = tuple(replicated)

    def info(self) -> ShardInfo:
        """What the engine needs to know of it."""
        return ShardInfo(
            weight_bytes=sum(tensor.nbytes for tensor in self._tensors()),
            value_bytes=4,
            hidden_size=0,
            layer_caches={},
            replicated=self._replicated,
        )

    def join(self, tp: Communicator) -> None:
        """Take part in a tensor-parallel group."""
        self._exchange.tp = tp

    @torch.inference_mode()
    def run(
        self, input_names: Sequence[str], inputs: Sequence[torch.Tensor], inbound: Sequence[Carried]
    ) -> list[Carried]:
        """Run the stage on a batch; ``inputs[i]`` ``[items, ...]`` is ``input_names[i]``.

        ``inbound`` is what the stage before gave, empty on the first. The last stage gives the
        outputs, in the order of ``output_names``.
        """
        if self._stage is not None:
            if tuple(input_names) != self._named.input_names:
                raise InputError(
                    f"the inputs are {', '.join(input_names)}; the model was cut for "
                    f"{', '.join(self._named.input_names)}"
                )
            return self._stage.run(inputs, inbound)
        if tuple(input_names) != self._named.input_names:
            self._named = self.model.named(input_names)
        outputs: tuple[Carried, ...] = self._named(*inputs)
        return list(outputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of what the last stage gives."""
        return self._named.output_names

    def _tensors(self) -> list[torch.Tensor]:
        if self._stage is not None:
            return list(self._stage.tensors())
        module = self.model.module
        found = {id(t): t for t in (*module.parameters(), *module.buffers())}
        return list(found.values())


def load_forward_shard(spec: ShardSpec, device: torch.device) -> ForwardShard:
    """Build, split, take apart and load one rank's part. Raises ModelError.

    The whole model is built on the host before the share is kept.
    """
    model, exchange = load_forward_model(spec.folder, spec.dtype), Exchange()
    if spec.pp_size == spec.tp_size == 1:
        model.module.to(device)
        return ForwardShard(model, model.named(()), exchange, None, spec)
    batch = example_batch(model, spec.example)
    named = model.named(batch.names)
    whole = split(named, batch, spec.tp_rank, spec.tp_size, exchange)
    if spec.pp_size == 1:
        model.module.to(device)
        return ForwardShard(model, named, exchange, None, spec, whole)
    from spanwise.model.pieces import take_apart  # takes long to import

    named(*batch.tensors)
    pieces = take_apart(named, batch.tensors, batch.varying)
    if pieces.num_pieces != spec.num_layers:
        raise ModelError(
            f"{spec.folder} came apart into {pieces.num_pieces} pieces, and into {spec.num_layers} "
            "before: its forward is not the same each time; use one stage (-pp 1)"
        )
    operations: dict[object, Callable[..., object]] = {
        torch.ops.spanwise.sum_over_ranks.default: exchange.all_reduce
    }
    stage = pieces.stage(spec.first_layer, spec.end_layer, operations)
    stage.to(device)
    # What the stage does not hold is freed; the module stays to be asked.
    model.module.to("meta")
    return ForwardShard(model, named, exchange, stage, spec, whole)


@torch.inference_mode()
def split(
    named: NamedForward, batch: ExampleBatch, rank: int, size: int, exchange: Exchange
) -> tuple[str, ...]:
    """Let a model hold one rank's share, in place; the names of the linears that stay whole."""
    if size == 1:
        return ()
    from spanwise.model.module_parallel import split_module

    run = partial(named, *(tensor[:1] for tensor in batch.tensors))
    return split_module(named.module, rank, size, exchange, run).whole
