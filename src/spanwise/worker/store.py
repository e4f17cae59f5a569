"""The process that serves the store where a replica's ranks meet before they have NCCL.

A process of its own, forked from the fork server: the supervisor has no torch to serve it with,
and a rank must not, for the store outlives any rank: those of the next epoch meet there again.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from spanwise.errors import EngineError
from spanwise.worker.channel import Channel
from spanwise.worker.entries import Entries, resolve
from spanwise.worker.failure import reported
from spanwise.worker.messages import Command, Serving


def run_store(entries: Entries, channel: Channel[Command], fds: Sequence[int]) -> None:
    """Serve on the listening socket given until the channel ends."""
    (listener_fd,) = fds
    with reported(channel, lambda: "serving the store of NCCL"):
        server = resolve(entries.store)(socket.socket(fileno=listener_fd))  # lives on threads
        channel.send(Serving())
        message = channel.receive()
        raise EngineError(f"{server} was told {message}")
