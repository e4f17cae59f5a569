"""Ctrl-C in a conversation: it ends a line or an answer, but not at once the program.

Outside of these blocks it keeps the meaning it had.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENOUGH = 3
_PATIENCE = b"\n(it ends with the step that is computed now; once more ends the chat)\n"


@contextmanager
def breaks_line() -> Iterator[None]:
    """In this block Ctrl-C raises KeyboardInterrupt."""
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def ends_answer(end: Callable[[], object]) -> Iterator[None]:
    """In this block Ctrl-C calls ``end``, once; who goes on pressing ends the program.

    Nothing is raised: an exception in the middle of a step would leave the engine's plans and
    results out of step, and ``LLM`` shuts down. ``end`` sets what is looked at between steps.
    Where nobody sits at standard input, Ctrl-C is meant for the program.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    num_presses = 0

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal num_presses
        num_presses += 1
        if num_presses == 1:
            end()
        elif num_presses < _ENOUGH:
            os.write(sys.stderr.fileno(), _PATIENCE)  # print may be what was interrupted
        else:
            assert callable(before)
            before(number, frame)

    with _handled_by(press):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
