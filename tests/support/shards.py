"""The shards of a tiny model on a layout."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_models import COMMON

from spanwise.layout.split import split_evenly
from spanwise.types.worker import ShardSpec


def shard_specs(
    folder: Path,
    pp: int = 1,
    tp: int = 1,
    expert_parallel: bool = False,
    num_layers: int = COMMON["num_hidden_layers"],
) -> list[ShardSpec]:
    """Of every rank, stage by stage, the layers split evenly."""
    return [
        ShardSpec(
            folder=str(folder),
            dtype="float32",
            first_layer=stage.start,
            end_layer=stage.stop,
            num_layers=num_layers,
            pp_rank=pp_rank,
            pp_size=pp,
            tp_rank=tp_rank,
            tp_size=tp,
            expert_parallel=expert_parallel,
        )
        for pp_rank, stage in enumerate(split_evenly(num_layers, pp))
        for tp_rank in range(tp)
    ]
