"""An answer's text on standard output, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spanwise.types.outputs import CompletionOutput


class TextStream:
    """Prints what a growing choice has new.

    Holds back an end that may become a stop string, which is no part of the answer.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._num_shown = 0

    def show(self, choice: CompletionOutput) -> None:
        """Print what is new; a finished choice to its end, closed with a newline."""
        text = choice.text
        if choice.finish_reason is None:
            text = text[: len(text) - held_back(text, self._stop_strings)]
        new = text[self._num_shown :]
        self._num_shown += len(new)
        sys.stdout.write(new)
        if choice.finish_reason is not None and not text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    longest = max(map(len, stop_strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0
