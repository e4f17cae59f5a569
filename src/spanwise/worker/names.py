"""What errors call the processes."""

from __future__ import annotations

from spanwise.types.worker import ShardSpec, WorkerSpec


def shard_name(spec: ShardSpec) -> str:
    """A shard of a replica."""
    return f"shard pp{spec.pp_rank}/tp{spec.tp_rank}"


def worker_name(spec: WorkerSpec) -> str:
    """A worker with its place and its device."""
    place = spec.place
    lane = f"/lane{place.lane}" if place.lane else ""
    return f"worker dp{place.dp}/pp{place.pp}{lane}/tp{place.tp} on {spec.device}"
