"""What a signal does to the program: undo what must not stay, and end at once.

Workers need no word: the kernel kills them when this process is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_undo: list[Callable[[], object]] = []


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and a closed terminal end the process with 128 + the signal."""
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's wish
        signal.signal(signal.SIGHUP, _end)


@contextmanager
def undone_when_stopped(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` should a signal end the process inside this block."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


def _end(number: int, frame: FrameType | None) -> None:
    for undo in reversed(_undo):
        undo()
    os._exit(128 + number)
