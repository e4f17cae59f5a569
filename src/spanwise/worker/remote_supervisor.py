"""The supervisor as the engine process sees it: the same work, done on the other side."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from spanwise.errors import EngineError
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import ShardInfo, ShardSpec
from spanwise.worker.calls import (
    Call,
    CallReply,
    DescribeModel,
    DescribeShards,
    Explain,
    Explained,
    Loading,
    LoadShards,
    ModelDescribed,
    Released,
    ReleaseReplica,
    Shards,
    Spawned,
    SpawnReplicas,
    UnloadShards,
)
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.failure import error_of
from spanwise.worker.messages import Failed, Reply
from spanwise.worker.replica import ReplicaSpec

Progress = Callable[[int, int], None]
Wanted = TypeVar("Wanted", bound=CallReply)


class RemoteWorker:
    """A worker owned by the supervisor: its name, and this side of its channel."""

    def __init__(self, name: str, pid: int, fd: int) -> None:
        self.name, self.pid = name, pid
        self.channel: Channel[Reply] = Channel(socket.socket(fileno=fd), Reply)


class RemoteReplica:
    """The running workers of one replica, in the order of the spec."""

    def __init__(
        self, owner: RemoteSupervisor, spec: ReplicaSpec, told: Spawned, fds: Sequence[int]
    ) -> None:
        self._owner, self.replica_id, self.spec = owner, told.replica_id, spec
        self.shards = list(told.shards)
        self.workers = [
            RemoteWorker(name, pid, fd)
            for name, pid, fd in zip(told.names, told.pids, fds, strict=True)
        ]
        self._is_closed = False

    def explain(self, index: int) -> str:
        """How a worker came to its end, as its parent saw it."""
        return self._owner.explain(self.replica_id, index)

    def close(self, timeout_s: float) -> None:
        """End the workers. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._owner.release(self.replica_id, timeout_s)
        for worker in self.workers:
            worker.channel.close()


class RemoteSupervisor:
    """Asks the supervisor's process; calls and errors are those of ``Supervisor``.

    For one thread at a time. Raises EngineError once the supervisor is gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._channel: Channel[CallReply] = Channel(sock, CallReply)

    def describe(self, source: ModelSource) -> ModelFacts:
        """Give a model's facts. Raises ModelError."""
        return self._ask(DescribeModel(source), ModelDescribed).facts

    def describe_shards(self, shards: Sequence[ShardSpec]) -> list[ShardInfo]:
        """Say what each shard will hold, without loading it. Raises ModelError."""
        return list(self._ask(DescribeShards(tuple(shards)), Shards).infos)

    def load(
        self, shards: Sequence[ShardSpec], progress: Progress | None = None
    ) -> list[ShardInfo]:
        """Load each shard into a zygote of its own. Raises ModelError."""
        return list(self._ask(LoadShards(tuple(shards)), Shards, progress).infos)

    def unload(self, shards: Sequence[ShardSpec]) -> None:
        """Take back one ``load`` of these shards."""
        self._ask(UnloadShards(tuple(shards)), Released)

    def spawn(self, specs: Sequence[ReplicaSpec]) -> list[RemoteReplica]:
        """Start the workers of all replicas. Raises DeviceError, ModelError."""
        self._call(SpawnReplicas(tuple(specs)))
        replicas = []
        for spec in specs:
            told, fds = self._receive(Spawned, None)
            replicas.append(RemoteReplica(self, spec, told, fds))
        return replicas

    def release(self, replica_id: int, timeout_s: float) -> None:
        """End the workers of a replica."""
        self._ask(ReleaseReplica(replica_id, timeout_s), Released)

    def explain(self, replica_id: int, index: int) -> str:
        """How a worker came to its end, as its parent saw it."""
        return self._ask(Explain(replica_id, index), Explained).text

    def _ask(self, call: Call, wanted: type[Wanted], progress: Progress | None = None) -> Wanted:
        self._call(call)
        return self._receive(wanted, progress)[0]

    def _call(self, call: Call) -> None:
        try:
            self._channel.send(call)
        except ChannelClosed as error:
            raise EngineError("the supervisor is gone") from error

    def _receive(
        self, wanted: type[Wanted], progress: Progress | None
    ) -> tuple[Wanted, tuple[int, ...]]:
        while True:
            try:
                reply, fds = self._channel.receive_with_fds()
            except ChannelClosed as error:
                raise EngineError("the supervisor is gone") from error
            if isinstance(reply, Loading):
                if progress is not None:
                    progress(reply.loaded, reply.wanted)
                continue
            if isinstance(reply, Failed):
                for fd in fds:
                    os.close(fd)
                raise error_of(reply)
            assert isinstance(reply, wanted), reply
            return reply, fds
