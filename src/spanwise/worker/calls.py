"""What the engine process asks of the supervisor, and the answers.

A failed call is answered by ``Failed``, and the supervisor goes on.
"""

from __future__ import annotations

import msgspec

from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import ShardInfo, ShardSpec
from spanwise.worker.messages import Failed
from spanwise.worker.replica import ReplicaSpec


class DescribeModel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by ``ModelDescribed``."""

    source: ModelSource


class DescribeShards(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by ``Shards``."""

    specs: tuple[ShardSpec, ...]


class LoadShards(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by any number of ``Loading`` and one ``Shards``."""

    specs: tuple[ShardSpec, ...]


class UnloadShards(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by ``Released``."""

    specs: tuple[ShardSpec, ...]


class SpawnReplicas(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by one ``Spawned`` for each replica."""

    specs: tuple[ReplicaSpec, ...]


class ReleaseReplica(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End the workers of a replica. Answered by ``Released``."""

    replica_id: int
    timeout_s: float


class Explain(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How a worker came to its end. Answered by ``Explained``."""

    replica_id: int
    index: int


class ModelDescribed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model's facts."""

    facts: ModelFacts


class Loading(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How far a load has come."""

    loaded: int
    wanted: int


class Shards(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What each shard holds, in the order asked."""

    infos: tuple[ShardInfo, ...]


class Spawned(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A replica takes plans. Comes with each worker's channel, in the order of the spec."""

    replica_id: int
    names: tuple[str, ...]
    pids: tuple[int, ...]
    shards: tuple[ShardInfo, ...]


class Released(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What was to be given back is given back."""


class Explained(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a process in words, as its parent saw it."""

    text: str


Call = (
    DescribeModel
    | DescribeShards
    | LoadShards
    | UnloadShards
    | SpawnReplicas
    | ReleaseReplica
    | Explain
)
CallReply = ModelDescribed | Loading | Shards | Spawned | Released | Explained | Failed
