"""What can be said of a model that is run by one forward, before its shards are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from spanwise.errors import ModelError
from spanwise.model.example import ExampleBatch, example_batch
from spanwise.model.exchange import Exchange
from spanwise.model.folder import is_factory
from spanwise.model.forward_model import (
    ForwardModel,
    describe_forward_model,
    load_forward_model,
)
from spanwise.model.forward_shard import split
from spanwise.model.module_parallel import max_tensor_parallel, tensor_refusal
from spanwise.types.forward import ForwardFacts, InputSpec
from spanwise.types.model import ModelFacts, ModelSource


def describe(source: ModelSource) -> ModelFacts:
    """Build the model, and where it is to be cut run it and measure its pieces. Raises ModelError.

    A module of the user's own is built in any case; a model of transformers without weights where
    nothing is to be measured.
    """
    if source.in_pieces or is_factory(source.folder):
        model = load_forward_model(source.folder, source.dtype)
    else:
        model = describe_forward_model(source.folder, source.dtype)
    facts = _facts(model)
    if not source.in_pieces:
        return facts
    from spanwise.model.pieces import take_apart  # takes long to import

    batch = example_batch(model, source.example)
    named = model.named(batch.names)
    try:
        if source.tp_size <= facts.num_attention_heads:
            split(named, batch, 0, source.tp_size, Exchange())
        named(*batch.tensors)
        pieces = take_apart(named, batch.tensors, batch.varying)
    except ModelError as error:
        return msgspec.structs.replace(facts, pipeline_refusal=str(error))
    if pieces.num_pieces == 1:
        alone = "its forward is one piece, in which nothing can be cut"
        return msgspec.structs.replace(facts, pipeline_refusal=alone)
    assert facts.forward is not None
    carried = tuple(-(-each // len(batch.tensors[0])) for each in pieces.carried_bytes)
    return msgspec.structs.replace(
        facts,
        num_layers=pieces.num_pieces,
        layer_bytes=pieces.weight_bytes,
        layer_costs_s=pieces.costs_s(batch.tensors),
        forward=msgspec.structs.replace(
            facts.forward, inputs=_fixed(batch, pieces.varying), carried_bytes=carried
        ),
    )


def _fixed(batch: ExampleBatch, varying: Sequence[Sequence[int]]) -> tuple[InputSpec, ...]:
    """The inputs, without the freedom that was lost when the model was taken apart."""
    inputs = []
    for spec, tensor, dims in zip(batch.inputs, batch.tensors, varying, strict=True):
        shape = tuple(None if d in dims else size for d, size in enumerate(tensor.shape[1:], 1))
        is_free = shape[:1] == (None,)
        inputs.append(msgspec.structs.replace(spec, shape=shape, pad=spec.pad if is_free else None))
    return tuple(inputs)


def _weight_bytes(model: ForwardModel) -> int:
    return sum(tensor.nbytes for tensor in model.module.state_dict(keep_vars=True).values())


def _facts(model: ForwardModel) -> ModelFacts:
    """What is known of the model as one piece."""
    heads = max_tensor_parallel(model.module)
    return ModelFacts(
        architecture=model.architecture,
        model_type=model.model_type,
        num_layers=1,
        hidden_size=0,
        vocab_size=0,
        max_position=0,
        num_attention_heads=heads,
        num_kv_heads=heads,
        intermediate_size=0,
        num_experts=0,
        tied_embeddings=False,
        layer_bytes=(_weight_bytes(model),),
        first_bytes=0,
        last_bytes=0,
        layer_caches=(),
        tensor_refusal=tensor_refusal(model.module),
        dtype=model.dtype,
        forward=ForwardFacts(inputs=model.inputs, labels=model.labels),
    )
