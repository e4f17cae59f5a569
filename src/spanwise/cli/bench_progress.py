"""How far a measurement is, on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from spanwise.cli.notes import Notes
from spanwise.cli.starting import silence_libraries
from spanwise.cli.stopping import undone_when_stopped


class ProgressLine:
    """One line on a terminal, written over itself.

    By hand: rich draws from a thread of its own, which would make the measured times uneven.
    """

    def __init__(self, quiet: bool) -> None:
        self.is_shown = sys.stderr.isatty() and not quiet

    def show(self, text: str) -> None:
        """Show a text in place of the last; none clears the line."""
        if self.is_shown:
            os.write(sys.stderr.fileno(), f"\r\x1b[2K{text}".encode())

    def clear(self) -> None:
        """Leave nothing on the line."""
        self.show("")


class StepProgress:
    """Measurements as they begin: on a terminal one line with what goes on, else a line each."""

    def __init__(self, quiet: bool) -> None:
        self._line = ProgressLine(quiet)
        self._notes = Notes(quiet)
        self._step = ""

    def step(self, line: str) -> None:
        """Take the line of a measurement that begins."""
        self._step = line
        self._line.show(line)
        if not self._line.is_shown:
            self._notes.line(line)

    def detail(self, line: str) -> None:
        """Take what the measurement says of itself."""
        self._line.show(f"{self._step}: {line}")

    def end(self) -> None:
        """Leave nothing on the line."""
        self._line.clear()

    def note(self, line: str) -> None:
        """Take a line to keep."""
        self._notes.line(line)


@contextmanager
def watching(quiet: bool) -> Iterator[StepProgress]:
    """Progress for measurements in this block, whose processes say nothing else.

    Ctrl-C leaves a clean line, and no process: those end with this one.
    """
    silence_libraries()
    progress = StepProgress(quiet)
    with undone_when_stopped(progress.end):
        yield progress
