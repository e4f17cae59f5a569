"""From the names a checkpoint stores to the tensors a model has.

transformers says how (renames, base-model prefix, merges); we turn that into sources that can be
read in parts, instead of converting whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from spanwise.errors import ModelError, reason
from spanwise.model.safetensors_file import StoredTensor
from spanwise.model.source import Computed, Concatenated, Source, Stacked, Stored, Transposed

Groups = list[list[Source]]
"""The sources an operation works on: one group for each of the converter's source patterns."""


@dataclass(frozen=True)
class Converted:
    """What a checkpoint gives a model: a source for each name, and what found no place.

    ``unplaced`` holds the name each such tensor would have in the model.
    """

    sources: dict[str, Source]
    unplaced: list[tuple[str, StoredTensor]]


@dataclass
class _Gathered:
    """The stored tensors that become one tensor (or, with several targets, a few)."""

    converter: WeightConverter | None
    groups: dict[str, list[StoredTensor]] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for group in self.groups.values() for tensor in group)


class FullShapes:
    """Stands for the uncut model where a conversion asks it for a shape or for its config."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.tensors: dict[str, torch.Tensor] = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in model.state_dict().items()
        }

    def get_parameter(self, name: str) -> torch.Tensor:
        """The parameter or persistent buffer, on the meta device."""
        return self.tensors[name]

    get_buffer = get_parameter
    get_parameter_or_buffer = get_parameter


def convert_names(
    stored: Mapping[str, StoredTensor], model: PreTrainedModel, full: FullShapes
) -> Converted:
    """Find a source for every tensor of the model. Raises ModelError where a merge cannot be."""
    gathered, unplaced = _gather(stored, model, full)
    sources: dict[str, Source] = {}
    for name, entry in gathered.items():
        made = _sources(name, entry, full)
        sources.update(
            (target, source) for target, source in made.items() if target in full.tensors
        )
        unplaced += [(target, made[target].stored[0]) for target in made.keys() - full.tensors]
    return Converted(sources, unplaced)


def _gather(
    stored: Mapping[str, StoredTensor], model: PreTrainedModel, full: FullShapes
) -> tuple[dict[str, _Gathered], list[tuple[str, StoredTensor]]]:
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = (model.base_model_prefix, full.tensors)
    gathered: dict[str, _Gathered] = {}
    unplaced = []
    # The order matters: a merge takes the experts in the order of their numbers.
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, *known)
        if name not in full.tensors and key in full.tensors:
            name, pattern = rename_source_key(key, [], [], *known)
        converter = by_pattern[pattern] if pattern is not None else None
        entry = gathered.setdefault(name, _Gathered(converter)) if name in full.tensors else None
        if entry is None or entry.converter is not converter or (entry.groups and not converter):
            unplaced.append((name, stored[key]))
        else:
            entry.groups.setdefault(pattern or key, []).append(stored[key])
    return gathered, unplaced


def _sources(name: str, entry: _Gathered, full: FullShapes) -> dict[str, Source]:
    if entry.converter is None:
        return {name: Stored(entry.stored[0])}
    source = _apart(name, entry.converter, entry.groups, full)
    return {name: source} if source is not None else _computed(name, entry, full)


def _apart(
    name: str,
    converter: WeightConverter,
    groups: Mapping[str, Sequence[StoredTensor]],
    full: FullShapes,
) -> Source | None:
    """The conversion as a source that is read in parts; None where an operation forbids it."""
    if len(converter.target_patterns) > 1:
        return None
    current: Groups = [
        [Stored(tensor) for tensor in groups[pattern]]
        for pattern in converter.source_patterns
        if pattern in groups
    ]
    for operation in converter.operations:
        apply = _APART.get(type(operation))
        if apply is None:
            return None
        current = apply(operation, current, name, full)
    sources = [source for group in current for source in group]
    return sources[0] if len(sources) == 1 else None


def _merge(operation: Any, groups: Groups, name: str, full: FullShapes) -> Groups:
    merged: Groups = []
    for group in groups:
        _require_agreement(group, None, name)
        merged.append([Stacked(tuple(group), operation.dim % (len(group[0].shape) + 1))])
    return merged


def _concatenate(operation: Any, groups: Groups, name: str, full: FullShapes) -> Groups:
    parts = [source for group in groups for source in group]
    dim = operation.dim % len(parts[0].shape)
    _require_agreement(parts, dim, name)
    return [[Concatenated(tuple(parts), dim)]]


def _transpose(operation: Any, groups: Groups, name: str, full: FullShapes) -> Groups:
    source = groups[0][0]
    if getattr(operation, "check_dims", False) and source.shape == full.tensors[name].shape:
        return groups
    rank = len(source.shape)
    return [[Transposed(source, (operation.dim0 % rank, operation.dim1 % rank))]]


_APART: dict[type, Callable[[Any, Groups, str, FullShapes], Groups]] = {
    MergeModulelist: _merge,
    Concatenate: _concatenate,
    Transpose: _transpose,
}


def _require_agreement(sources: Sequence[Source], free_dim: int | None, name: str) -> None:
    first = sources[0]
    for source in sources:
        pairs = enumerate(zip(first.shape, source.shape, strict=False))
        differing = [dim for dim, (one, other) in pairs if one != other and dim != free_dim]
        if differing or len(first.shape) != len(source.shape):
            raise ModelError(
                f"{source.stored[0].where} has shape {list(source.stored[0].shape)} and "
                f"{first.stored[0].where} has {list(first.stored[0].shape)}: they cannot be "
                f"merged into '{name}'; download the model again"
            )


def _computed(name: str, entry: _Gathered, full: FullShapes) -> dict[str, Source]:
    """Sources of a conversion that is run whole; its results are known by running it on meta."""
    made = _run(name, entry, full, _on_meta)
    return {
        target: Computed(tuple(result.shape), entry.stored, _maker(target, name, entry, full))
        for target, result in made.items()
    }


def _maker(
    target: str, name: str, entry: _Gathered, full: FullShapes
) -> Callable[[], torch.Tensor]:
    return lambda: _run(name, entry, full, StoredTensor.view)[target]


def _on_meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _run(
    name: str, entry: _Gathered, full: FullShapes, read: Callable[[StoredTensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    converter: Any = deepcopy(entry.converter)
    for pattern, tensors in entry.groups.items():
        for tensor in tensors:
            converter.add_tensor(name, tensor.name, pattern, read(tensor))
    try:
        made = converter.convert(name, model=full, config=full.config)
    except Exception as error:
        # Whatever a foreign operation stumbles over, the user must learn which tensor it was.
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise ModelError(
            f"{entry.stored[0].where} cannot be converted to '{name}' by {operations} "
            f"({reason(error)}); use another transformers version, or save the model anew"
        ) from error
    return {
        target: made[target][0] if isinstance(made[target], list) else made[target]
        for target in made
    }
