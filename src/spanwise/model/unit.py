"""A part of a module that could be split over ranks, as its structure suggests it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from spanwise.model.parallel import is_linear
from spanwise.model.share import Ranges, Share


@dataclass(frozen=True)
class Unit(ABC):
    """A part that could be split. ``kind``: alike parts are understood alike, or not at all.

    ``columns`` are dealt out, ``row`` sums; ``otherwise``: what else the structure could mean.
    """

    name: str
    kind: tuple[object, ...]
    columns: tuple[nn.Module, ...]
    row: nn.Module
    otherwise: Unit | None = None

    @property
    @abstractmethod
    def most(self) -> int:
        """The most ranks that each get something."""

    @abstractmethod
    def shares(self, size: int) -> tuple[Share, ...]:
        """Each rank's share; empty where there is no split over so many."""


def children(module: nn.Module) -> Iterator[tuple[str, type[nn.Module]]]:
    """What a module is made of, for a unit's kind."""
    return ((leaf, type(child)) for leaf, child in module.named_children())


def only_linear(module: nn.Module) -> nn.Module | None:
    """A linear, or the only linear directly in a module."""
    if is_linear(module):
        return module
    inside = [child for child in module.children() if is_linear(child)]
    return inside[0] if len(inside) == 1 else None


def scaled(share: range, unit: int) -> Ranges:
    """The columns of a run of heads that are ``unit`` wide each."""
    return ((share.start * unit, share.stop * unit),)


def moved(ranges: Ranges, by: int) -> Ranges:
    """The ranges ``by`` further on."""
    return tuple((start + by, end + by) for start, end in ranges)
