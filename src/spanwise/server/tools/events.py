"""What an answer turns out to hold, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Text that belongs to no call. Never empty."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; ``index`` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments: the pieces joined are one JSON object."""

    index: int
    json_fragment: str


@dataclass(frozen=True)
class CallEnd:
    """A call is complete."""

    index: int


ToolEvent = Text | CallStart | CallArguments | CallEnd
