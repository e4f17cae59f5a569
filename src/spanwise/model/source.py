"""Where a model's tensor comes from: stored as it is, or put together from stored tensors.

A source copies only the wanted part of itself, so a merge of experts reads only the owned ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Protocol, TypeVar

import torch

from spanwise.model.safetensors_file import StoredTensor

T = TypeVar("T")
Range = tuple[int, int]
Part = tuple[tuple[Range, ...], ...]
"""For every dim the half-open ranges kept, which stand one after the other in the result."""


class Source(Protocol):
    """A tensor that can be had in parts. ``stored`` are the tensors in files it is made of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors it is made of, in order."""
        ...

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Fill ``out``, which has the part's shape (any strides, any dtype)."""
        ...


def whole(shape: Sequence[int]) -> Part:
    """The part that is everything."""
    return tuple(((0, size),) for size in shape)


def part_shape(part: Part) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(sum(end - begin for begin, end in ranges) for ranges in part)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.tensor.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The one tensor."""
        return (self.tensor,)

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Copy the part's blocks out of the mapped file."""
        _copy_blocks(out, self.tensor.view(), part)


@dataclass(frozen=True)
class Concatenated:
    """Sources one after the other along ``dim``; their other dims agree."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The parts' tensors, in order."""
        return tuple(tensor for part in self.parts for tensor in part.stored)

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Copy from the parts that the ranges touch, from each only what they touch."""
        starts = [0, *accumulate(source.shape[self.dim] for source in self.parts)]
        filled = 0
        for wanted in part[self.dim]:
            for source, start in zip(self.parts, starts, strict=False):
                begin, end = _overlap(wanted, start, source.shape[self.dim])
                if begin < end:
                    piece = out.narrow(self.dim, filled, end - begin)
                    source.copy_into(piece, _with_dim(part, self.dim, ((begin, end),)))
                    filled += end - begin


@dataclass(frozen=True)
class Stacked:
    """Sources of one shape, stacked along a new dim."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        inner = self.parts[0].shape
        return (*inner[: self.dim], len(self.parts), *inner[self.dim :])

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The parts' tensors, in order."""
        return tuple(tensor for part in self.parts for tensor in part.stored)

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Copy from the wanted sources only."""
        inner = (*part[: self.dim], *part[self.dim + 1 :])
        indices = [index for begin, end in part[self.dim] for index in range(begin, end)]
        for place, index in enumerate(indices):
            self.parts[index].copy_into(out.select(self.dim, place), inner)


@dataclass(frozen=True)
class Transposed:
    """A source with two dims swapped."""

    source: Source
    dims: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return _swapped(self.source.shape, self.dims)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The source's tensors."""
        return self.source.stored

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Copy the swapped part into the swapped output."""
        self.source.copy_into(out.transpose(*self.dims), _swapped(part, self.dims))


@dataclass(frozen=True)
class Computed:
    """A source whose operation is not taken apart: the whole is made, then cut."""

    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    make: Callable[[], torch.Tensor]

    def copy_into(self, out: torch.Tensor, part: Part) -> None:
        """Make the whole tensor and copy the part's blocks out of it."""
        _copy_blocks(out, self.make(), part)


def _copy_blocks(out: torch.Tensor, tensor: torch.Tensor, part: Part) -> None:
    for combination in product(*map(_moves, part)):
        source, target = tensor, out
        for dim, (taken, placed, length) in enumerate(combination):
            source = source.narrow(dim, taken, length)
            target = target.narrow(dim, placed, length)
        target.copy_(source)


def _moves(ranges: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
    """Where each range starts, where it goes, and its length."""
    placed = 0
    for begin, end in ranges:
        yield begin, placed, end - begin
        placed += end - begin


def _overlap(wanted: Range, start: int, size: int) -> Range:
    """The wanted range within a piece of ``size`` that begins at ``start``, in its own counting."""
    return max(wanted[0] - start, 0), min(wanted[1] - start, size)


def _with_dim(part: Part, dim: int, ranges: tuple[Range, ...]) -> Part:
    return (*part[:dim], ranges, *part[dim + 1 :])


def _swapped(items: Sequence[T], dims: tuple[int, int]) -> tuple[T, ...]:
    swapped = list(items)
    swapped[dims[0]], swapped[dims[1]] = swapped[dims[1]], swapped[dims[0]]
    return tuple(swapped)
