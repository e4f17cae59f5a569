"""The process that owns one device: plans in, results out."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from functools import partial

from spanwise.errors import DeviceError
from spanwise.types.worker import DeviceSpec
from spanwise.worker.channel import Channel
from spanwise.worker.device_meter import DeviceMeter
from spanwise.worker.entries import Entries, LoadedShard, StepRunner, resolve, set_threads
from spanwise.worker.failure import reported
from spanwise.worker.messages import Command, Done, Execute, Ping, Pong, Ready, RunWorker
from spanwise.worker.names import worker_name


def run_worker(
    entries: Entries,
    job: RunWorker,
    channel: Channel[Command],
    fds: Sequence[int],
    shard: LoadedShard | None = None,
) -> None:
    """Execute plans until the channel ends. Without a shard the worker loads it to its card."""
    where = f"{worker_name(job.spec)} starting"
    with reported(channel, lambda: where):
        pin(job.spec.device)
        segment_fd, arena_fd = fds
        if shard is None:
            shard, arena = resolve(entries.card)(job.spec, job.arena_bytes)
        else:
            arena = mmap.mmap(arena_fd, job.arena_bytes) if job.arena_bytes else bytearray()
        # Last, for joining over NCCL waits for every rank.
        comm = resolve(entries.comm)(segment_fd, job.spec, job.may_spin)
        runner: StepRunner = resolve(entries.runner)(shard, job.spec, comm, arena)
        meter = DeviceMeter(partial(resolve(entries.memory), job.spec.device))
        channel.send(Ready(shard.info()))
        while True:
            message = channel.receive()
            if isinstance(message, Ping):
                channel.send(Pong(meter.read()))
                continue
            assert isinstance(message, Execute)
            plan = message.plan
            where = f"{worker_name(job.spec)} in step {plan.step}"
            with meter:
                result = runner.execute(plan)
            if result is not None:
                channel.send(Done(result))


def pin(device: DeviceSpec) -> None:
    """Keep this process on the device's cores. Raises DeviceError where they are not there."""
    set_threads(device.threads)
    if not device.cores:
        return
    try:
        os.sched_setaffinity(0, device.cores)
    except OSError as error:
        allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        wanted = ",".join(map(str, device.cores))
        raise DeviceError(
            f"{device} names the cores {wanted}, but this process may use {allowed}: "
            "name fewer devices or start with other cores"
        ) from error
