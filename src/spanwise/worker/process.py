"""A process below the supervisor, as the supervisor sees it."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterable, Sequence

from spanwise.errors import WorkerError
from spanwise.worker.channel import Channel
from spanwise.worker.failure import error_of
from spanwise.worker.messages import Exited, Failed, Forked, Job, Reply


class Process:
    """Who it is, how to talk to it, how to end it. ``name`` is what errors call it."""

    def __init__(self, name: str, pid: int, pidfd: int, channel: Channel[Reply]) -> None:
        self.name = name
        self.pid = pid
        self.channel = channel
        self._pidfd = pidfd

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return not self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; True when it has ended."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1e3))

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended already."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Forget a process that has ended."""
        self.channel.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class ForkingProcess(Process):
    """The fork server or a zygote. ``exits`` (pid -> code) gathers what it says of its children."""

    def __init__(self, process: Process, exits: dict[int, int]) -> None:
        super().__init__(process.name, process.pid, process._pidfd, process.channel)
        self._exits = exits

    def fork(self, name: str, job: Job, fds: Sequence[int] = ()) -> Process:
        """Have a child forked for a job. Raises ChannelClosed, or what the process reported."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.channel.send(job, [theirs.fileno(), *fds])
            while not isinstance((entry := self.channel.receive_with_fds())[0], Forked):
                self._note(entry[0])
        except BaseException:
            ours.close()
            raise
        forked, (pidfd,) = entry
        assert isinstance(forked, Forked)
        self._exits.pop(forked.pid, None)  # of an earlier process with the same number
        return Process(name, forked.pid, pidfd, Channel(ours, Reply))

    def gather_exits(self) -> None:
        """Read what it has said of ended children so far. Raises ChannelClosed."""
        for reply, _ in self.channel.arrived():
            self._note(reply)

    def _note(self, reply: Reply) -> None:
        if isinstance(reply, Failed):
            raise error_of(reply)
        assert isinstance(reply, Exited)
        self._exits[reply.pid] = reply.code


def next_reply(process: Process) -> Reply:
    """Wait for the process's next reply. Raises ChannelClosed, or the error it reports."""
    reply = process.channel.receive()
    if isinstance(reply, Failed):
        raise error_of(reply)
    return reply


def end(processes: Iterable[Process], timeout_s: float) -> None:
    """End processes: ask, and after the time is up terminate, then kill. Returns when all ended."""
    alive = list(processes)
    for process in alive:
        process.channel.finish()
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, timeout_s / 4)):
        alive = _still_alive(alive, patience_s)
        for process in alive:
            process.signal(number)
    if stuck := _still_alive(alive, max(timeout_s, 5.0)):
        names = ", ".join(process.name for process in stuck)
        raise WorkerError(f"could not be killed, the kernel holds on to: {names}")


def _still_alive(processes: Sequence[Process], timeout_s: float) -> list[Process]:
    deadline = time.monotonic() + timeout_s
    return [each for each in processes if not each.wait(deadline - time.monotonic())]
