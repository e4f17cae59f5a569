"""How long prompts and answers are: a number, a range, or a mix of them."""

from __future__ import annotations

import re
from random import Random

import msgspec

from spanwise.errors import InputError

_PART = re.compile(r"(\d{1,9})(?::(\d{1,9}))?(?:@(\d{1,9}(?:\.\d{1,9})?))?", re.ASCII)


class LengthRange(msgspec.Struct, frozen=True):
    """Lengths from ``low`` to ``high``, both included, all as likely; drawn ``weight`` times."""

    low: int
    high: int
    weight: float = 1.0


class Lengths(msgspec.Struct, frozen=True):
    """A mix of ranges."""

    ranges: tuple[LengthRange, ...]

    @property
    def longest(self) -> int:
        """The longest that may be drawn."""
        return max(each.high for each in self.ranges)

    def draw(self, random: Random) -> int:
        """Draw a length; every draw takes two numbers from ``random``."""
        place = random.random() * sum(each.weight for each in self.ranges)
        within = random.random()
        for chosen in self.ranges:
            place -= chosen.weight
            if place < 0:
                break
        return chosen.low + int(within * (chosen.high - chosen.low + 1))


def fixed(length: int) -> Lengths:
    """Always the same length."""
    return Lengths((LengthRange(length, length),))


def parse_lengths(name: str, text: str) -> Lengths:
    """Read "128", "32:256" or a mix "32@3,8:16@1", weights after the @. Raises InputError."""
    matches = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    ranges = tuple(
        LengthRange(int(low), int(high or low), float(weight or 1))
        for low, high, weight in (match.groups() for match in matches if match is not None)
    )
    good = len(ranges) == len(matches)
    if not good or not all(1 <= each.low <= each.high and each.weight > 0 for each in ranges):
        raise InputError(
            f"{name} must be tokens such as 128, 32:256 (any of them) or 32@3,512@1 (a mix with "
            f"weights), got {text!r:.80}"
        )
    return Lengths(ranges)
