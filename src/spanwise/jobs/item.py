"""One item of a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """``index`` counts the items from 0. ``name`` is how a person finds it: a file, a line.

    ``content`` is as the source has it: the bytes of a line, a path, a row's values.
    """

    index: int
    name: str
    content: Any


def heading(item: Item) -> dict[str, Any]:
    """What a record begins with, so that its item is found again."""
    named = {"file": item.name} if isinstance(item.content, Path) else {}
    return {"index": item.index, **named}


@dataclass(frozen=True)
class Extent:
    """How many items a source has, and what tells its contents from others."""

    num_items: int
    digest: str


class Source(Protocol):
    """Where items come from: in the same order each time, and never all of them in memory."""

    def extent(self) -> Extent:
        """Read all of it once. Raises InputError where it cannot be read."""

    def items(self, first: int) -> Iterator[Item]:
        """The items from number ``first`` on."""
