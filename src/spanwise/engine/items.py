"""Items as a caller has them, to tensors that travel, and back. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spanwise.errors import InputError
from spanwise.types.forward import InputSpec, TensorData

Array = NDArray[Any]
Item = Any
"""An array (numpy's, torch's, or nested numbers), a tuple of arrays, or a mapping by name."""

_MOST_BYTES = (1 << 32) - 1  # what a record can hold

_SHORTEST_BUCKET = 16
_PARTS_OF_DOUBLING = 4


class Items:
    """Checks items against what a model takes."""

    def __init__(self, specs: Sequence[InputSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._required = [s.name for s in specs if not s.optional and not s.like]

    def read(self, item: Item) -> tuple[TensorData, ...]:
        """The item's inputs. Raises InputError naming the input that cannot be used."""
        named = self._named(item)
        if missing := [name for name in self._required if name not in named]:
            raise InputError(f"input '{missing[0]}' is missing; the model takes {self._known()}")
        if unknown := [name for name in named if name not in self._specs]:
            raise InputError(f"input '{unknown[0]}' is not known; the model takes {self._known()}")
        read = [_tensor(self._specs[name], named[name]) for name in self._specs if name in named]
        self._check_lengths(read)
        return tuple(read)

    def shape(self, inputs: Sequence[TensorData]) -> tuple[object, ...]:
        """What items of one batch have in common: their inputs, and sizes that cannot be filled up.

        Lengths that can are told apart by buckets, of which there are four to each doubling: so at
        most about a fifth of a batch is filling.
        """
        key: list[object] = []
        for each in inputs:
            pads = self._specs[each.name].pad is not None
            sizes = (_bucket(each.shape[0]), *each.shape[1:]) if pads else each.shape
            key += [each.name, each.dtype, sizes]
        return tuple(key)

    def cost(self, inputs: Sequence[TensorData]) -> int:
        """The length of what may be filled up; 1 where nothing may."""
        lengths = [e.shape[0] for e in inputs if self._specs[e.name].pad is not None]
        return max(lengths, default=1)

    def _named(self, item: Item) -> Mapping[str, Any]:
        if isinstance(item, Mapping):
            return item
        if isinstance(item, tuple):
            if len(item) > len(self._specs):
                raise InputError(f"{len(item)} inputs were given; the model takes {self._known()}")
            return dict(zip(self._specs, item, strict=False))
        return {next(iter(self._specs)): item}

    def _known(self) -> str:
        return ", ".join(self._specs)

    def _check_lengths(self, inputs: Sequence[TensorData]) -> None:
        """What is filled up together is of one length."""
        lengths = {e.name: e.shape[0] for e in inputs if self._specs[e.name].pad is not None}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"inputs of one item must be of one length, got {said}")
        if 0 in lengths.values():
            raise InputError(f"input '{next(iter(lengths))}' is empty; give at least one entry")


def read_example(example: Item) -> tuple[TensorData, ...]:
    """The inputs of an item for a model of which nothing is known yet.

    Those of a sequence, or an array alone, are named by their place. Raises InputError.
    """
    if isinstance(example, Mapping):
        named = dict(example)
    else:
        given = example if isinstance(example, tuple) else (example,)
        named = {str(place): each for place, each in enumerate(given)}
    return tuple(_tensor(InputSpec(name=str(name)), each) for name, each in named.items())


def to_arrays(outputs: Sequence[TensorData]) -> dict[str, Array]:
    """What an item was given, by name. bfloat16, which numpy does not have, comes as float32."""
    return {each.name: to_array(each) for each in outputs}


def to_array(data: TensorData) -> Array:
    """The tensor as numpy has it."""
    if data.dtype == "bfloat16":
        wide = np.frombuffer(data.data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(data.shape)
    own = bytearray(data.data)  # which may be written to
    return np.frombuffer(own, np.dtype(data.dtype)).reshape(data.shape)


def _tensor(spec: InputSpec, given: Any) -> TensorData:
    array = _array(spec, given)
    if spec.shape is not None:
        fits = len(spec.shape) == array.ndim and all(
            wanted is None or wanted == size
            for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise InputError(
                f"input '{spec.name}' has shape {list(array.shape)}, expected [{wanted}] "
                "(one item, without a batch's dim)"
            )
    if array.dtype.kind == "f" and bool(np.isnan(array).any()):
        raise InputError(f"input '{spec.name}' holds NaN; give numbers")
    if array.nbytes > _MOST_BYTES:
        raise InputError(f"input '{spec.name}' has {array.nbytes} bytes, more than 4 GiB; cut it")
    return TensorData(spec.name, array.dtype.name, array.shape, array.tobytes())


def _array(spec: InputSpec, given: Any) -> Array:
    try:
        if hasattr(given, "detach"):  # a tensor of torch
            given = given.detach().cpu()
            given = (given.float() if str(given.dtype) == "torch.bfloat16" else given).numpy()
        array = np.asarray(given)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    except (ValueError, TypeError) as error:
        raise InputError(f"input '{spec.name}' is no array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"input '{spec.name}' holds {array.dtype.name}, not numbers; give an array of numbers"
        )
    if spec.dtype == "int64":
        if array.dtype.kind == "f":
            raise InputError(f"input '{spec.name}' holds {array.dtype.name}; give whole numbers")
        return array.astype(np.int64)
    return array.astype(np.float32) if spec.dtype else array


def _bucket(length: int) -> int:
    """The bucket's longest."""
    if length <= _SHORTEST_BUCKET:
        return _SHORTEST_BUCKET
    unit = max(1 << (length - 1).bit_length() - 1, 1) // _PARTS_OF_DOUBLING
    return math.ceil(length / unit) * unit
