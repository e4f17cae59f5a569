"""Reads text that is still growing.

Every reader here is a generator: it yields where it can go no further until more text has come, and
takes up from there, so that no character is looked at twice however small the pieces are.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

from spanwise.errors import SpanwiseError

T = TypeVar("T")
Reading = Generator[None, None, T]

SPACES = " \t\n\r"
_SPACE = re.compile(f"[{SPACES}]*")


class NotACallError(SpanwiseError):
    """What is being read is certainly no call."""


class UnfinishedCallError(NotACallError):
    """The text ended within what would have been a call."""


class Cursor:
    """``text`` from the last commit on, and ``at``: how far it is read."""

    def __init__(self, text: str = "", *, ended: bool = False) -> None:
        self.text = text
        self.at = 0
        self.ended = ended

    def drop(self, count: int) -> str:
        """Give away the first ``count`` characters, and read from what is left."""
        given, self.text = self.text[:count], self.text[count:]
        self.at = 0
        return given

    def more(self) -> Reading[None]:
        """Wait for more text. Raises UnfinishedCallError where none will come."""
        if self.ended:
            raise UnfinishedCallError("the text ended")
        yield

    def peek(self) -> Reading[str]:
        """The next character, unread; "" at the end of the text."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Reading[None]:
        """Pass over white space."""
        yield from self.run(_SPACE)

    def run(self, characters: re.Pattern[str]) -> Reading[str]:
        """The longest run that matches; ``characters`` is a class repeated, `[...]*`."""
        start = self.at
        while True:
            match = characters.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return self.text[start : self.at]
            yield

    def follows(self, *options: str) -> Reading[str]:
        """Pass over the first of the options that comes next, and return it; "" if none does."""
        while True:
            waiting = False
            for option in options:
                have = self.text[self.at : self.at + len(option)]
                if have == option:
                    self.at += len(option)
                    return option
                if option.startswith(have) and not self.ended:
                    waiting = True
                    break
            if not waiting:
                return ""
            yield

    def literal(self, expected: str) -> Reading[None]:
        """Pass over what must come next."""
        while True:
            have = self.text[self.at : self.at + len(expected)]
            if have == expected:
                self.at += len(expected)
                return
            if not expected.startswith(have):
                raise NotACallError(f"expected {expected!r}")
            yield from self.more()

    def close(self, closing: str) -> Reading[None]:
        """Pass over space and the mark that ends a call, of which the end may cut off any part.

        A stop string or a token limit takes it away when all that it closes is there.
        """
        yield from self.space()
        while True:
            have = self.text[self.at : self.at + len(closing)]
            if have == closing or (self.ended and closing.startswith(have)):
                self.at += len(have)
                return
            if not closing.startswith(have):
                raise NotACallError(f"expected {closing!r}")
            yield

    def until(self, mark: str) -> Reading[str]:
        """The text before the mark, and pass over both."""
        start = searched = self.at
        while (found := self.text.find(mark, searched)) < 0:
            searched = max(start, len(self.text) - len(mark) + 1)
            yield from self.more()
        self.at = found + len(mark)
        return self.text[start:found]


def read_whole(reading: Reading[T]) -> T:
    """The result of a reading whose text has ended, so that it never waits."""
    try:
        next(reading)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a reading waits at the end of its text")
