"""Items to a batch, and a batch's outputs to items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from spanwise.errors import ModelError
from spanwise.model.tensor_data import from_tensor, to_tensor
from spanwise.types.forward import InputSpec, TensorData

Item = Mapping[str, torch.Tensor]
LengthsOf = Callable[[str, int], Callable[[int], int] | None]


@dataclass(frozen=True)
class Batch:
    """``tensors[i]`` ``[items, ...]`` is the input ``names[i]``.

    ``lengths[k]`` is how long item k is where items were filled up to ``filled_to``; None where
    none was.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...] | None
    filled_to: int


def collate(
    items: Sequence[tuple[TensorData, ...]], specs: Sequence[InputSpec], dtype: torch.dtype | None
) -> Batch:
    """Stack the items, which all have the same inputs, filled up where their specs say how.

    What is not whole numbers comes in the model's ``dtype``.
    """
    by_name = [{each.name: _cast(to_tensor(each), dtype) for each in item} for item in items]
    lengths = _lengths(by_name, specs)
    filled = {s.name: s for s in specs if s.pad is not None}
    names, tensors = [], []
    for spec in specs:
        if spec.name in by_name[0]:
            parts = [item[spec.name] for item in by_name]
            names.append(spec.name)
            tensors.append(_filled(parts, spec.pad) if spec.name in filled else torch.stack(parts))
        elif spec.like in by_name[0]:
            parts = [torch.full((len(item[spec.like]),), spec.value) for item in by_name]
            names.append(spec.name)
            tensors.append(_filled(parts, spec.pad))
    return Batch(tuple(names), tuple(tensors), lengths, max(lengths) if lengths else 0)


def outputs_of(
    batch: Batch,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    lengths_of: LengthsOf,
) -> list[tuple[TensorData, ...]]:
    """What each item is given, without what belongs to its filling.

    ``lengths_of(name, num_dims)`` says how long that output is along dim 1 for an input of a given
    length; None for one that has no such dim.
    """
    num_items = len(batch.tensors[0])
    given: list[list[TensorData]] = [[] for _ in range(num_items)]
    for name, tensor in zip(names, tensors, strict=True):
        length_of = None if batch.lengths is None else lengths_of(name, tensor.dim())
        host = tensor.cpu()
        for index in range(num_items):
            own = host[index]
            if length_of is not None:
                own = _own_part(name, own, batch, index, length_of)
            given[index].append(from_tensor(name, own))
    return [tuple(outputs) for outputs in given]


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _own_part(
    name: str, given: torch.Tensor, batch: Batch, index: int, length_of: Callable[[int], int]
) -> torch.Tensor:
    """What of an output is not of an item's filling; all of it where it was not filled up."""
    assert batch.lengths is not None
    length = batch.lengths[index]
    if length == batch.filled_to:
        return given
    if len(given) != (expected := length_of(batch.filled_to)):
        raise ModelError(
            f"output '{name}' has {len(given)} entries for an input of {batch.filled_to}, where "
            f"{expected} were expected: which are of an item's filling is not known"
        )
    return given[: length_of(length)]


def _lengths(items: Sequence[Item], specs: Sequence[InputSpec]) -> tuple[int, ...] | None:
    """Of the input that the others are as long as: the first that is filled up."""
    first = next((s.name for s in specs if s.pad is not None and s.name in items[0]), None)
    return None if first is None else tuple(len(item[first]) for item in items)


def _filled(parts: Sequence[torch.Tensor], pad: float | None) -> torch.Tensor:
    longest = max(len(part) for part in parts)
    out = torch.full((len(parts), longest, *parts[0].shape[1:]), pad or 0, dtype=parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out
