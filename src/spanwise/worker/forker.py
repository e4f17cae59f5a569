"""The loop of a process that forks others: the fork server and the zygotes."""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.messages import Command, Execute, Exited, Forked, Job, Ping

JobRunner = Callable[[Job, Channel[Command], Sequence[int]], None]


class Forker:
    """Forks a child for each job and reports how children ended, adopted ones too.

    A single thread, so that forking is safe. ``run(job, channel, fds)`` is what a child does.
    """

    def __init__(self, channel: Channel[Command], run: JobRunner) -> None:
        self._channel = channel
        self._run = run
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def serve(self) -> None:
        """Fork until the channel ends."""
        gc.collect()
        gc.freeze()  # a collection in a child would write to every shared page
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            try:
                while True:
                    self._serve_once(selector)
            except ChannelClosed:
                list(_ended_children())  # leave no zombies to whoever adopts them

    def _serve_once(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select():
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
                self._report_exits()
            else:
                for job, fds in self._channel.arrived():
                    assert not isinstance(job, Execute | Ping)
                    self._fork(job, fds, selector)

    def _fork(self, job: Job, fds: Sequence[int], selector: selectors.BaseSelector) -> None:
        pid = os.fork()
        if pid == 0:
            selector.close()
            self._become(job, fds)
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._channel.send(Forked(pid), [pidfd])
        os.close(pidfd)

    def _become(self, job: Job, fds: Sequence[int]) -> NoReturn:
        """Be the child: do the job and end, whatever happens."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._wake_read.close()
            self._wake_write.close()
            self._channel.close()
            channel: Channel[Command] = Channel(socket.socket(fileno=fds[0]), Command)
            self._run(job, channel, fds[1:])
            code = 0
        except ChannelClosed:
            code = 0  # the supervisor wants nothing more
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _report_exits(self) -> None:
        for pid, code in _ended_children():
            self._channel.send(Exited(pid, code))


def _ended_children() -> Iterator[tuple[int, int]]:
    """Reap every child that has ended: its pid and code."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)
