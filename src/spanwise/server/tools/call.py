"""What the formats and the parser hand one another."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass


@dataclass(frozen=True)
class RawCall:
    """A call as it was read; ``arguments`` is the JSON of an object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Thinking:
    """The block a model thinks in before it answers: no call is read in it.

    ``anywhere``: it may come later too. ``resume``: what stands between the block and the answer.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    anywhere: bool = False
    resume: str = ""


# Gives None while it waits for more text, and every call as soon as it is certain.
Calls = Generator[RawCall | None, None, None]
