"""A pipe whose breaking kills every process below its owner, however the owner ended."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import weakref

_F_SETSIG = 10  # fcntl.F_SETSIG exists in Python's fcntl from 3.13 only


class Lifeline:
    """The owner's side: the write end, which nobody else ever holds.

    A process that the owner itself forks (multiprocessing, say) closes its copy at once: it must
    not keep the workers alive after the owner.
    """

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        _owned.add(self)

    def close_read(self) -> None:
        """Close the end that was handed down."""
        os.close(self.read_fd)

    def cut(self) -> None:
        """Kill whoever still holds the other end."""
        if self in _owned:
            _owned.discard(self)
            os.close(self._write_fd)


def hang_on(read_fd: int) -> None:
    """Tie this process, and all it will fork, to the lifeline.

    The kernel sends SIGKILL to the whole process group when the write end closes: no thread has to
    watch, so it works while the main thread loads, imports or is stuck, and survives each fork.
    The caller must lead its process group.
    """
    fcntl.fcntl(read_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(read_fd, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(read_fd, fcntl.F_GETFL)
    fcntl.fcntl(read_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    poll = select.poll()
    poll.register(read_fd)
    if poll.poll(0):  # the owner died before this was armed
        os._exit(1)


_owned: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _cut_in_child() -> None:
    for lifeline in list(_owned):
        lifeline.cut()


os.register_at_fork(after_in_child=_cut_in_child)
