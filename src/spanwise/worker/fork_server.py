"""The process that has everything imported and forks the others: ``-m`` this module.

It never touches CUDA, which does not survive a fork, and has one thread.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec

from spanwise.errors import EngineError
from spanwise.worker.channel import Channel
from spanwise.worker.entries import Entries, resolve
from spanwise.worker.failure import reported
from spanwise.worker.forker import Forker
from spanwise.worker.lifeline import hang_on
from spanwise.worker.messages import (
    Command,
    Describe,
    Described,
    DescribeShard,
    Job,
    LoadShard,
    RunWorker,
    ServeStore,
    ShardDescribed,
)
from spanwise.worker.names import shard_name
from spanwise.worker.store import run_store
from spanwise.worker.worker import run_worker
from spanwise.worker.zygote import run_zygote

_PR_SET_CHILD_SUBREAPER = 36


def main(channel_fd: int, lifeline_fd: int, entries: Entries) -> None:
    """Import, then fork until the supervisor's channel ends."""
    hang_on(lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor to decide on
    _adopt_orphans()
    channel: Channel[Command] = Channel(socket.socket(fileno=channel_fd), Command)

    def run(job: Job, own: Channel[Command], fds: Sequence[int]) -> None:
        _run_job(entries, job, own, fds)

    with reported(channel, lambda: "the fork server"):
        # Imports leave nothing to collect and a million objects to look at: a fifth of their time.
        gc.disable()
        entries.import_all()
        gc.freeze()
        gc.enable()
        Forker(channel, run).serve()
    os._exit(0)  # nothing here needs the interpreter's slow way out


def _run_job(entries: Entries, job: Job, channel: Channel[Command], fds: Sequence[int]) -> None:
    match job:
        case Describe():
            with reported(channel, lambda: f"describing {job.source.folder}"):
                facts = resolve(entries.describe)(job.source)
                channel.send(Described(facts))
        case DescribeShard():
            with reported(channel, lambda: f"describing {shard_name(job.spec)}"):
                channel.send(ShardDescribed(resolve(entries.describe_shard)(job.spec)))
        case LoadShard():
            run_zygote(entries, job.spec, channel)
        case RunWorker():
            run_worker(entries, job, channel, fds)
        case ServeStore():
            run_store(entries, channel, fds)


def _adopt_orphans() -> None:
    """Become the parent of workers whose zygote died, so that their end is still reported."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise EngineError(f"prctl refused to adopt orphans: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=Entries))
