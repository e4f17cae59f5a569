"""What the parallel parts of one shard share during a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from spanwise.comm.communicator import Communicator
from spanwise.comm.single import SingleCommunicator
from spanwise.model.batch import StepBatch


@dataclass
class ShardContext:
    """The tensor-parallel group, the step at hand, and the hidden states from the stage before.

    One object per shard, held by its parts; ``tp`` is set when a worker joins its group.
    """

    tp: Communicator = field(default_factory=SingleCommunicator)
    batch: StepBatch | None = None
    inbound: torch.Tensor | None = None

    @property
    def step(self) -> StepBatch:
        """The step being computed."""
        assert self.batch is not None, "no step is being computed"
        return self.batch
