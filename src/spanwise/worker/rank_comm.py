"""Which communicators a rank gets. Imports torch: for workers only."""

from __future__ import annotations

from spanwise.comm.communicator import RankComm
from spanwise.comm.counters import DEFAULT_SPIN_S
from spanwise.comm.shared_memory import open_rank_comm
from spanwise.types.worker import WorkerSpec


def open_comm(segment_fd: int, spec: WorkerSpec, may_spin: bool) -> RankComm:
    """Join the replica's segment. A rank that shares its core sleeps at once when it waits."""
    spin_s = DEFAULT_SPIN_S if may_spin else 0.0
    return open_rank_comm(segment_fd, spec.shard.pp_rank, spec.shard.tp_rank, spin_s=spin_s)
