"""What the shares of a split module sum over, also where torch.export traces them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import library

from spanwise.comm.communicator import Communicator
from spanwise.comm.single import SingleCommunicator


@library.custom_op("spanwise::sum_over_ranks", mutates_args=())
def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The place of a sum in an exported graph; run as it is, the sum over a group of one."""
    return tensor.clone()


@sum_over_ranks.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


@dataclass
class Exchange:
    """The tensor-parallel group of one shard, held by its parts; ``tp`` is set when it is joined.

    An exported graph knows no group: it holds ``torch.ops.spanwise.sum_over_ranks``, for which
    whoever runs the graph puts ``all_reduce``.
    """

    tp: Communicator = field(default_factory=SingleCommunicator)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on each; ``tensor`` may be written to."""
        if not torch.compiler.is_exporting():
            return self.tp.all_reduce(tensor)
        total: torch.Tensor = sum_over_ranks(tensor)
        return total
