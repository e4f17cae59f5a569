"""gloo where NCCL would be, without cards."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class GlooAsNccl(dist.ProcessGroupGloo):
    """What NcclGroups asks of NCCL, without cards."""

    class Options:
        _timeout: timedelta

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        super().__init__(store, rank, size, options._timeout)

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == torch.device("cpu")
