"""The supervisor's side of the border to the engine process: calls in, answers out."""

from __future__ import annotations

from itertools import count

from spanwise.errors import SpanwiseError
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
from spanwise.worker.failure import failure_of
from spanwise.worker.replica import Replica
from spanwise.worker.supervisor import Supervisor


class SupervisorService:
    """Does for one engine process what it may not do itself: it owns no process and no memory.

    Workers' channels are handed over as copies: a worker does not notice when the engine ends.
    """

    def __init__(self, supervisor: Supervisor, channel: Channel[Call]) -> None:
        self._supervisor, self._channel = supervisor, channel
        self._replicas: dict[int, Replica] = {}
        self._ids = count()

    def serve(self) -> None:
        """Answer calls until the engine's end of the channel closes; then close this end."""
        try:
            while True:
                self._answer(self._channel.receive())
        except ChannelClosed:
            self._channel.close()

    def _answer(self, call: Call) -> None:
        try:
            if isinstance(call, SpawnReplicas):
                self._spawn(call)
            else:
                self._channel.send(self._reply(call))
        except ChannelClosed:
            raise
        except SpanwiseError as error:
            self._channel.send(failure_of(error, type(call).__name__))

    def _reply(self, call: Call) -> CallReply:
        supervisor = self._supervisor
        match call:
            case DescribeModel():
                return ModelDescribed(supervisor.describe(call.source))
            case DescribeShards():
                return Shards(tuple(supervisor.describe_shards(call.specs)))
            case LoadShards():
                return Shards(tuple(supervisor.load(call.specs, self._tell_loading)))
            case UnloadShards():
                supervisor.unload(call.specs)
                return Released()
            case ReleaseReplica():
                self._replicas.pop(call.replica_id).close(call.timeout_s)
                return Released()
            case Explain():
                replica = self._replicas[call.replica_id]
                return Explained(supervisor.explain(replica.workers[call.index]))
            case SpawnReplicas():
                raise AssertionError("answered by several records")

    def _tell_loading(self, loaded: int, wanted: int) -> None:
        self._channel.send(Loading(loaded, wanted))

    def _spawn(self, call: SpawnReplicas) -> None:
        for replica in self._supervisor.spawn(call.specs):
            replica_id = next(self._ids)
            self._replicas[replica_id] = replica
            names = tuple(worker.name for worker in replica.workers)
            pids = tuple(worker.pid for worker in replica.workers)
            spawned = Spawned(replica_id, names, pids, tuple(replica.shards))
            self._channel.send(spawned, [worker.channel.fileno() for worker in replica.workers])
