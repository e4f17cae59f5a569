"""A small batch to run a model on before the first item has come."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn

from spanwise.errors import ModelError
from spanwise.model.forward_model import ForwardModel, NamedForward
from spanwise.model.tensor_data import to_tensor
from spanwise.types.forward import InputSpec, TensorData

_LENGTHS = {"input_ids": 24, "decoder_input_ids": 8, "input_values": 16_000}
_NUM_ITEMS = 2
_SIDE = 224

_Dim = tuple[int, int]  # of which tensor, and which of its dims


@dataclass(frozen=True)
class ExampleBatch:
    """``tensors[i]`` ``[items, ...]`` is the input ``names[i]``; its dims ``varying[i]`` vary.

    ``inputs``: what the model takes, with the sizes that were open before.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    varying: tuple[tuple[int, ...], ...]
    inputs: tuple[InputSpec, ...]


def example_batch(model: ForwardModel, given: Sequence[TensorData] = ()) -> ExampleBatch:
    """A batch of the item given, of what the module calls its ``example_inputs``, or a drawn one.

    Where nothing says which sizes of an input vary, those do that the model was seen to run with
    twice as large. Raises ModelError where nothing says what the model takes.
    """
    specs = {spec.name: spec for spec in model.inputs}
    item = _given(given, list(specs)) or _own(model.module) or _drawn(model)
    if unknown := sorted(item.keys() - specs.keys()):
        raise ModelError(
            f"the example has the input '{unknown[0]}', the model takes {', '.join(specs)}"
        )
    missing = {s.name: s for s in model.inputs if s.like in item and s.name not in item}
    for name, spec in missing.items():
        item[name] = torch.full(item[spec.like].shape, spec.value)
    names = tuple(name for name in specs if name in item)
    tensors = tuple(item[n][None].expand(_NUM_ITEMS, *item[n].shape).contiguous() for n in names)
    found = _shapes(model.named(names), [specs[name] for name in names], tensors)
    varying = tuple((0, *(d for d, s in enumerate(shape, 1) if s is None)) for shape in found)
    shapes = dict(zip(names, found, strict=True))
    inputs = tuple(
        msgspec.structs.replace(spec, shape=shapes[spec.name], optional=False)
        for spec in model.inputs
        if spec.name in shapes
    )
    return ExampleBatch(names, tensors, varying, inputs)


def _shapes(
    named: NamedForward, specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor]
) -> list[tuple[int | None, ...]]:
    """Of each input the sizes without the batch's; None for those that vary."""
    shapes: list[list[int | None]] = [
        list(tensor.shape[1:]) if spec.shape is None else list(spec.shape)
        for spec, tensor in zip(specs, tensors, strict=True)
    ]
    open_dims: dict[int, list[_Dim]] = defaultdict(list)
    for place, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
        if spec.shape is None:
            for dim in range(1, tensor.dim()):
                open_dims[tensor.shape[dim]].append((place, dim))
    for alike in open_dims.values():
        # Those of one size may have to be: all at once, and then each by itself.
        vary = alike if _runs(named, tensors, alike) else []
        vary = vary or [each for each in alike if _runs(named, tensors, [each])]
        for place, dim in vary:
            shapes[place][dim - 1] = None
    return [tuple(shape) for shape in shapes]


def _runs(named: NamedForward, tensors: Sequence[torch.Tensor], dims: Sequence[_Dim]) -> bool:
    """Whether the model takes an example that is twice as large in these dims."""
    larger = list(tensors)
    for place, dim in dims:
        larger[place] = torch.cat([larger[place], larger[place]], dim)
    try:
        with torch.inference_mode():
            named(*larger)
    except Exception:  # whatever the user's module says to a size it does not take
        return False
    return True


def _given(given: Sequence[TensorData], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """An item's inputs, which may be named by their place."""
    placed = {str(place): name for place, name in enumerate(names)}
    return {placed.get(each.name, each.name): to_tensor(each) for each in given}


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    own: Any = getattr(module, "example_inputs", None)
    if own is None:
        return {}
    own = own() if callable(own) else own
    if not isinstance(own, Mapping) or not all(isinstance(v, torch.Tensor) for v in own.values()):
        raise ModelError(
            f"example_inputs of {type(module).__name__} must be a dict of the tensors of one item, "
            "by the names of the forward's arguments"
        )
    return dict(own)


def _drawn(model: ForwardModel) -> dict[str, torch.Tensor]:
    if any(spec.shape is None and not spec.optional for spec in model.inputs):
        raise ModelError(
            f"{model.architecture} must be run once before it is cut, and nothing says what it "
            "takes; give example=, or give it a method example_inputs() that returns the tensors "
            "of one item by name"
        )
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model.module, "config", None)
    item = {}
    for spec in model.inputs:
        if spec.optional or spec.like:
            continue
        shape = _sizes(spec, config)
        if spec.dtype == "int64":
            vocabulary = getattr(config.get_text_config(), "vocab_size", 2)
            item[spec.name] = torch.randint(0, vocabulary, shape, generator=generator)
        else:
            dtype = getattr(torch, spec.dtype or "float32")
            item[spec.name] = torch.randn(shape, generator=generator).to(dtype)
    return item


def _sizes(spec: InputSpec, config: Any) -> tuple[int, ...]:
    assert spec.shape is not None
    own = _LENGTHS.get(spec.name, _SIDE)
    text = config.get_text_config() if config is not None else None
    longest = getattr(text, "max_position_embeddings", None) or math.inf
    fitting = int(min(own, longest))
    return tuple(fitting if size is None else size for size in spec.shape)
