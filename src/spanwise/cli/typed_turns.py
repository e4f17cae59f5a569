"""What a user says, read from a terminal or a pipe a turn at a time."""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple

from spanwise.cli.ctrl_c import breaks_line
from spanwise.errors import InputError

_QUOTES = '"""'


class Typed(NamedTuple):
    """One turn. ``is_quoted``: it stood between triple quotes, so it is no command."""

    text: str
    is_quoted: bool


class TypedTurns:
    """Turns of standard input: a line each, or all between triple quotes."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        if self.is_interactive and importlib.util.find_spec("readline") is not None:
            import readline  # noqa: F401 # gives `input` its history and keys

    def read(self) -> Typed | None:
        """The next turn, None at the end. Raises KeyboardInterrupt for Ctrl-C on a terminal.

        Raises InputError for what is not UTF-8, and for quotes that the end leaves open.
        """
        line = self._line("> ")
        if line is None or not line.startswith(_QUOTES):
            return None if line is None else Typed(line, False)
        lines = [line.removeprefix(_QUOTES)]
        while len(lines[-1].rstrip()) < 3 or not lines[-1].rstrip().endswith(_QUOTES):
            if (line := self._line(". ")) is None:
                raise InputError(f"the end came before the closing {_QUOTES}")
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return Typed("\n".join(lines).strip("\n"), True)

    def _line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            return _piped_line()
        if not sys.stdout.isatty():  # answers go to a file; there the prompt is out of place
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            with breaks_line():
                line = input(prompt)
        except EOFError:
            return None
        return _checked(line)


def _piped_line() -> str | None:
    line = sys.stdin.buffer.readline()
    try:
        return line.decode().rstrip("\r\n") if line else None
    except UnicodeDecodeError:
        raise InputError("a line of standard input is not UTF-8") from None


def _checked(line: str) -> str:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise InputError("the line is not UTF-8") from None
    return line
