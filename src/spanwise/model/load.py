"""A model for what it is run for: described, and loaded shard by shard.

What cuts models of one forward is imported where it is needed: taking them apart is slow to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spanwise.model import facts, shard
from spanwise.types.model import ModelFacts, ModelSource
from spanwise.types.worker import ShardInfo, ShardSpec

if TYPE_CHECKING:
    from spanwise.model.forward_shard import ForwardShard

_CPU = torch.device("cpu")


def describe(source: ModelSource) -> ModelFacts:
    """What is known of a model before its shards are loaded. Raises ModelError."""
    if source.task == "forward":
        from spanwise.model.forward_facts import describe as describe_forward

        return describe_forward(source)
    return facts.describe(source.folder, source.dtype)


def describe_shard(spec: ShardSpec) -> ShardInfo:
    """What ``load_shard`` would hold. Raises ModelError."""
    if spec.task == "forward":
        return load_shard(spec).info()
    return shard.describe_shard(spec)


def load_shard(spec: ShardSpec, device: torch.device = _CPU) -> shard.Shard | ForwardShard:
    """One rank's part of a model. Raises ModelError, DeviceError where it does not fit."""
    if spec.task == "forward":
        from spanwise.model.forward_shard import load_forward_shard

        return load_forward_shard(spec, device)
    return shard.load_shard(spec, device)
