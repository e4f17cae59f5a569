"""What a job does with its items, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from spanwise.errors import SpanwiseError
from spanwise.jobs.item import Item

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """An item that has ended: with a record of the output, or an error of its own."""

    index: int
    outcome: Record | SpanwiseError


class Task(Protocol):
    """A running model, with the way from items to what it takes, and from results to records.

    One item's failure is that item's: InputError from ``prepare`` or ``start``, or an error in
    ``finished``. Everything else that is raised ends the job.
    """

    @property
    def capacity(self) -> int:
        """How many items may be in flight."""

    def prepare(self, item: Item) -> Any:
        """What ``start`` needs of it. Called on any thread."""

    def start(self, item: Item, prepared: Any) -> None:
        """Put an item in flight; its index comes back once."""

    def finished(self) -> list[Finished]:
        """Wait a moment for items in flight; none may have ended."""

    def error_record(self, item: Item, error: SpanwiseError) -> Record:
        """What the error file says of an item."""
