"""Which communicators a rank gets. Imports torch: for workers only."""

from __future__ import annotations

from spanwise.comm.communicator import RankComm
from spanwise.comm.counters import DEFAULT_SPIN_S
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.types.worker import WorkerSpec


def open_comm(segment_fd: int, spec: WorkerSpec, may_spin: bool) -> RankComm:
    """Join the replica: over NCCL where a store was made for that, else over its segment.

    A rank that shares its core sleeps at once when it waits.
    """
    if spec.store_port:
        return _nccl(spec)
    spin_s = DEFAULT_SPIN_S if may_spin else 0.0
    return open_rank_comm(segment_fd, spec.shard.pp_rank, spec.shard.tp_rank, spin_s=spin_s)


def _nccl(spec: WorkerSpec) -> RankComm:
    from spanwise.comm.nccl import NcclGroups, connect_store  # a CPU rank need not wait for them
    from spanwise.device.memory import place

    groups = NcclGroups(
        connect_store(spec.store_port),
        name=f"epoch {spec.epoch}",  # the store is the replica's own
        pp_size=spec.shard.pp_size,
        tp_size=spec.shard.tp_size,
        pp_rank=spec.shard.pp_rank,
        tp_rank=spec.shard.tp_rank,
        device=place(spec.device),
    )
    return groups.comm
