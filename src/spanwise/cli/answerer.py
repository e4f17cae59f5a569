"""Who answers in a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

Message = dict[str, str]


class Reply(NamedTuple):
    """An answer. ``finish_reason`` is None where it was stopped from outside."""

    text: str
    finish_reason: str | None


class Answerer(Protocol):
    """A model somewhere that goes on with a conversation."""

    def answer(self, messages: Sequence[Message], attempt: int) -> Reply:
        """Print the answer to the last message as it comes, until it ends or Ctrl-C ends it.

        ``attempt`` counts how often the same was asked before: a seed must not give the same again.
        Raises InputError for what cannot be answered, SpanwiseError for what failed.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
