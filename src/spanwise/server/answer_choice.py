"""One choice of an answer as its news come: text, calls, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spanwise.server.errors import timed_out
from spanwise.server.tools.events import Text, ToolEvent
from spanwise.server.tools.parser import ToolParser
from spanwise.types.plan import TokenLogprobs
from spanwise.types.serving import ChoiceDelta

AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Piece:
    """What is new of a choice; ``end`` in the last piece of it, and only there."""

    events: Sequence[ToolEvent]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    end: AnswerEnd | None


class AnswerChoice:
    """Turns the engine's deltas into pieces; ``parser`` finds the calls, where there may be any.

    ``is_named``: one function was named, and calling it is no end of its own.
    """

    def __init__(self, index: int, parser: ToolParser | None, is_named: bool = False) -> None:
        self.index = index
        self.has_ended = False
        self._parser, self._is_named = parser, is_named

    @property
    def may_call(self) -> bool:
        """Whether there may be calls in it."""
        return self._parser is not None

    def take(self, delta: ChoiceDelta) -> Piece | None:
        """The piece that a delta makes; None where nothing more is wanted of this choice.

        Raises ApiError where the engine gave the request up.
        """
        if self.has_ended:
            return None
        if delta.finish_reason == "deadline":
            raise timed_out()
        events, end = self._events(delta), self._end(delta)
        self.has_ended = end is not None
        return Piece(events, delta.token_ids, delta.logprobs, end)

    def _events(self, delta: ChoiceDelta) -> list[ToolEvent]:
        if self._parser is None:
            return [Text(delta.text)] if delta.text else []
        events = self._parser.feed(delta.text)
        return events + self._parser.finish() if delta.finish_reason is not None else events

    def _end(self, delta: ChoiceDelta) -> AnswerEnd | None:
        reason = delta.finish_reason
        called = self._parser is not None and self._parser.num_calls > 0
        if reason == "length":
            return "length"
        if reason is None and not (called and self._parser is not None and self._parser.done):
            return None
        return "tool_calls" if called and not self._is_named else "stop"
