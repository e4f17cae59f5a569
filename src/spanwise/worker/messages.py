"""Everything that is said between the supervising process and the processes below it.

A channel's end is the order to stop; there is no record for it.
"""

from __future__ import annotations

import msgspec

from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.worker import DeviceReading, ShardInfo, ShardSpec, WorkerSpec


class Describe(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a child that answers ``Described`` and ends. Comes with its channel."""

    source: ModelSource


class DescribeShard(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a child that answers ``ShardDescribed`` and ends. Comes with its channel."""

    spec: ShardSpec


class LoadShard(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a zygote that loads a shard and answers ``Loaded``. Comes with its channel."""

    spec: ShardSpec


class RunWorker(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a worker that answers ``Ready``. Comes with its channel, the segment and the arena.

    ``may_spin``: the rank has its cores to itself, so it may wait by looking. A card's arena lies
    on the card; the file that comes for it is empty.
    """

    spec: WorkerSpec
    arena_bytes: int
    may_spin: bool


class ServeStore(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a child that answers ``Serving`` and serves. Comes with its channel and the listener."""


class Execute(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run one step; plans are executed in the order they are sent."""

    plan: StepPlan


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer ``Pong``: the thread that runs the model shows that it is not stuck."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer, once every plan sent before the ``Ping`` has been run."""

    reading: DeviceReading


class Forked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The child asked for lives. Comes with its pidfd, opened before anybody could reap it."""

    pid: int


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A child has ended; ``code`` as in subprocess: minus the signal, or the exit code."""

    pid: int
    code: int


class Described(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model's facts."""

    facts: ModelFacts


class ShardDescribed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What the shard will hold once it is loaded."""

    info: ShardInfo


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The zygote holds its shard."""

    info: ShardInfo


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The worker takes plans."""

    info: ShardInfo


class Serving(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The store takes connections."""


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step's result, from the one rank of a replica that has it."""

    result: StepResult


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The sender ends. ``kind`` is the name of a class in ``spanwise.errors``."""

    kind: str
    message: str


Job = Describe | DescribeShard | LoadShard | RunWorker | ServeStore
Command = Job | Execute | Ping
Answer = Described | ShardDescribed | Loaded | Ready | Serving
Reply = Forked | Exited | Answer | Done | Pong | Failed
