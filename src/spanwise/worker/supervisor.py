"""The process tree's owner: starts the fork server, loads shards, spawns workers, ends them all."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from spanwise.comm.store import listen_on_loopback
from spanwise.errors import DeviceError, WorkerError
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import ShardInfo, ShardSpec, WorkerSpec
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.entries import Entries
from spanwise.worker.lifeline import Lifeline
from spanwise.worker.messages import (
    Answer,
    Describe,
    Described,
    DescribeShard,
    Job,
    Loaded,
    LoadShard,
    Ready,
    Reply,
    RunWorker,
    ServeStore,
    Serving,
    ShardDescribed,
)
from spanwise.worker.names import shard_name, worker_name
from spanwise.worker.process import ForkingProcess, Process, end, next_reply
from spanwise.worker.python_process import python_path
from spanwise.worker.replica import Replica, ReplicaSpec

Progress = Callable[[int, int], None]
AnswerType = TypeVar("AnswerType", bound=Answer)

_STATUS_WAIT_S = 1.0
_ENVIRONMENT = {
    # numpy's would start threads in the fork server.
    "OPENBLAS_NUM_THREADS": "1",
    # Whether there is a card is asked of the driver's management library: a library that asks CUDA
    # while the fork server imports it would take CUDA from every worker.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # As that library counts, and with it device names.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class Supervisor:
    """Owns every process below this one; they end with it, however it ends.

    For one thread at a time. A process that is gone when it is needed raises WorkerError.
    """

    def __init__(self, entries: Entries | None = None) -> None:
        """Start the fork server; it imports while this process goes on."""
        if sys.platform != "linux":
            raise DeviceError(f"worker processes need Linux, not {sys.platform}: use one device")
        self._exits: dict[int, int] = {}
        self._zygotes: dict[ShardSpec, ForkingProcess] = {}
        self._infos: dict[ShardSpec, ShardInfo] = {}
        self._users: Counter[ShardSpec] = Counter()
        self._replicas: list[Replica] = []
        self._lifeline = Lifeline()
        self._popen, self._server = self._start(entries or Entries())

    def describe(self, source: ModelSource) -> ModelFacts:
        """Give a model's facts. Raises ModelError."""
        name, job = f"the process describing {source.folder}", Describe(source)
        (described,) = self._ask([(name, job)], Described)
        return described.facts

    def describe_shards(self, shards: Sequence[ShardSpec]) -> list[ShardInfo]:
        """Say what each shard will hold, without loading it. Raises ModelError."""
        jobs = [(f"the process describing {shard_name(x)}", DescribeShard(x)) for x in shards]
        return [described.info for described in self._ask(jobs, ShardDescribed)]

    def load(
        self, shards: Sequence[ShardSpec], progress: Progress | None = None
    ) -> list[ShardInfo]:
        """Load each shard into a zygote of its own, all at once; say what each one holds.

        A shard that is loaded already is shared: its weights stand once in memory.

        ``progress(loaded, wanted)`` is called as they come. Raises ModelError.
        """
        fresh = [spec for spec in dict.fromkeys(shards) if spec not in self._zygotes]
        try:
            zygotes = [self._zygote(spec) for spec in fresh]
            replies = self._replies(zygotes, Loaded, progress)
        except BaseException:
            self._end_zygotes(fresh)
            raise
        self._infos.update(zip(fresh, (each.info for each in replies), strict=True))
        self._users.update(shards)
        return [self._infos[spec] for spec in shards]

    def unload(self, shards: Sequence[ShardSpec]) -> None:
        """Take back one ``load`` of these shards; weights nobody uses any more are freed."""
        self._users.subtract(shards)
        self._end_zygotes([spec for spec in dict.fromkeys(shards) if not self._users[spec]])

    def spawn(self, specs: Sequence[ReplicaSpec]) -> list[Replica]:
        """Start the workers of all replicas and wait until they take plans.

        A worker is a fork of its shard's zygote; a CUDA worker, since CUDA does not survive a fork,
        is one of the fork server and loads its own shard. Raises DeviceError, ModelError.
        """
        may_spin = not _crowded([worker for spec in specs for worker in spec.workers])
        before = len(self._replicas)
        try:
            replicas = [self._replica(spec, may_spin) for spec in specs]
            workers = [worker for replica in replicas for worker in replica.workers]
            ready = dict(zip(workers, self._replies(workers, Ready), strict=True))
        except BaseException:
            for replica in self._replicas[before:]:
                replica.close(_STATUS_WAIT_S)
            raise
        for replica in replicas:
            replica.shards = [ready[worker].info for worker in replica.workers]
        return replicas

    def pids(self) -> list[int]:
        """Every process below this one that is alive."""
        return [process.pid for process in self._everyone() if process.is_alive()]

    def explain(self, process: Process) -> str:
        """How a process whose channel has ended came to its end, as its parent saw it."""
        deadline = time.monotonic() + _STATUS_WAIT_S
        while (code := self._code_of(process)) is None and time.monotonic() < deadline:
            self._gather_exits(deadline - time.monotonic())
        if code is None:
            return "is gone"
        return f"died from signal {-code}" if code < 0 else f"ended with exit code {code}"

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """End every process: ask, terminate after the time, kill. May be called again."""
        for replica in list(self._replicas):
            replica.close(timeout_s)
        end(self._zygotes.values(), timeout_s)
        end([self._server], timeout_s)
        self._popen.wait()
        self._lifeline.cut()
        for process in (self._server, *self._zygotes.values()):
            process.close()

    def _start(self, entries: Entries) -> tuple[subprocess.Popen[bytes], ForkingProcess]:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._lifeline.read_fd)
        arguments = [str(fds[0]), str(fds[1]), msgspec.json.encode(entries).decode()]
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "spanwise.worker.fork_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout belongs to the user's own output
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": python_path()},
                pass_fds=fds,
                start_new_session=True,
            )
        self._lifeline.close_read()
        channel: Channel[Reply] = Channel(ours, Reply)
        process = Process("the fork server", popen.pid, os.pidfd_open(popen.pid), channel)
        return popen, ForkingProcess(process, self._exits)

    def _end_zygotes(self, specs: Sequence[ShardSpec]) -> None:
        ending = [self._zygotes.pop(spec) for spec in specs if spec in self._zygotes]
        end(ending, _STATUS_WAIT_S)
        for zygote in ending:
            zygote.close()

    def _zygote(self, spec: ShardSpec) -> ForkingProcess:
        name = f"the zygote of {shard_name(spec)}"
        zygote = ForkingProcess(self._fork(self._server, name, LoadShard(spec)), self._exits)
        self._zygotes[spec] = zygote
        return zygote

    def _replica(self, spec: ReplicaSpec, may_spin: bool) -> Replica:
        replica = Replica(spec, self.explain, self._replicas.remove)
        self._replicas.append(replica)
        store_port = self._serve_store(replica) if spec.has_own_cards else 0
        for worker, arena_bytes in zip(spec.workers, spec.arena_bytes, strict=True):
            on_cuda = worker.device.kind == "cuda"
            forker = self._server if on_cuda else self._zygotes[worker.shard]
            fds = (replica.segment_fd, replica.new_arena(0 if on_cuda else arena_bytes))
            told = msgspec.structs.replace(worker, store_port=store_port)
            job = RunWorker(told, arena_bytes, may_spin)
            replica.workers.append(self._fork(forker, worker_name(worker), job, fds))
        return replica

    def _serve_store(self, replica: Replica) -> int:
        """Start the replica's store and give its port."""
        with listen_on_loopback() as listener:
            name, fds = "the store of NCCL", (listener.fileno(),)
            replica.store = self._fork(self._server, name, ServeStore(), fds)
            port: int = listener.getsockname()[1]
        self._replies([replica.store], Serving)
        return port

    def _ask(self, jobs: Sequence[tuple[str, Job]], expected: type[AnswerType]) -> list[AnswerType]:
        """Have children (what errors call them, what they do) that answer and end; all at once."""
        children: list[Process] = []
        try:
            for name, job in jobs:
                children.append(self._fork(self._server, name, job))
            return self._replies(children, expected)
        finally:
            end(children, _STATUS_WAIT_S)
            for child in children:
                child.close()

    def _fork(
        self, forker: ForkingProcess, name: str, job: Job, fds: Sequence[int] = ()
    ) -> Process:
        try:
            return forker.fork(name, job, fds)
        except ChannelClosed as error:
            raise WorkerError(f"{forker.name} {self.explain(forker)}") from error

    def _replies(
        self,
        processes: Sequence[Process],
        expected: type[AnswerType],
        progress: Progress | None = None,
    ) -> list[AnswerType]:
        """Wait for one reply of each process; in the processes' order."""
        replies: dict[Process, AnswerType] = {}
        with selectors.DefaultSelector() as selector:
            for process in processes:
                selector.register(process.channel, selectors.EVENT_READ, process)
            while len(replies) < len(processes):
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    replies[key.data] = self._reply(key.data, expected)
                    if progress is not None:
                        progress(len(replies), len(processes))
        return [replies[process] for process in processes]

    def _reply(self, process: Process, expected: type[AnswerType]) -> AnswerType:
        try:
            reply = next_reply(process)
        except ChannelClosed as error:
            raise WorkerError(f"{process.name} {self.explain(process)}") from error
        assert isinstance(reply, expected), reply
        return reply

    def _code_of(self, process: Process) -> int | None:
        if process is self._server:
            return self._popen.poll()
        return self._exits.get(process.pid)

    def _gather_exits(self, timeout_s: float) -> None:
        """Hear the fork server and the zygotes on ended children, waiting for the first word."""
        with selectors.DefaultSelector() as selector:
            for forker in (self._server, *self._zygotes.values()):
                selector.register(forker.channel, selectors.EVENT_READ, forker)
            for key, _ in selector.select(timeout_s):
                with suppress(ChannelClosed):
                    key.data.gather_exits()

    def _everyone(self) -> Iterable[Process]:
        yield self._server
        yield from self._zygotes.values()
        for replica in self._replicas:
            yield from replica.workers
            if replica.store is not None:
                yield replica.store


def _crowded(workers: Sequence[WorkerSpec]) -> bool:
    """Whether workers compute with more threads than they have cores to run on."""
    cores: set[int] = set()
    for worker in workers:  # one that names no cores may run anywhere
        cores |= set(worker.device.cores) or os.sched_getaffinity(0)
    return sum(worker.device.threads for worker in workers) > len(cores)
