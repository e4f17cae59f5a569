"""Whole numbers in a flag."""

from __future__ import annotations

from collections.abc import Iterable

from spanwise.errors import InputError


def parse_whole_numbers(flag: str, texts: Iterable[str]) -> list[int]:
    """Numbers of "5,7", or of the flag given several times. Raises InputError."""
    words = [word.strip() for text in texts for word in text.split(",")]
    try:
        return [int(word) for word in words]
    except ValueError:
        said = ",".join(words)
        raise InputError(f"{flag} must be whole numbers such as 5,7, got {said!r:.80}") from None
