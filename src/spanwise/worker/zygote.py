"""The process that holds one shard's weights, runs no step, and forks the workers that do."""

from __future__ import annotations

from collections.abc import Sequence

from spanwise.types.worker import ShardSpec
from spanwise.worker.channel import Channel
from spanwise.worker.entries import Entries, LoadedShard, resolve
from spanwise.worker.failure import reported
from spanwise.worker.forker import Forker
from spanwise.worker.messages import Command, Job, Loaded, RunWorker
from spanwise.worker.names import shard_name
from spanwise.worker.worker import run_worker


def run_zygote(entries: Entries, spec: ShardSpec, channel: Channel[Command]) -> None:
    """Load with one thread and no collectives (both must survive a fork), then fork workers."""
    with reported(channel, lambda: f"loading {shard_name(spec)} of {spec.folder}"):
        shard: LoadedShard = resolve(entries.load)(spec)
        channel.send(Loaded(shard.info()))

    def run(job: Job, own: Channel[Command], fds: Sequence[int]) -> None:
        assert isinstance(job, RunWorker) and job.spec.shard == spec
        run_worker(entries, job, own, fds, shard)

    Forker(channel, run).serve()
