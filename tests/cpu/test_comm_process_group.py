"""Operations of a torch process group."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from spanwise.comm.process_group import Operations
from spanwise.errors import CommunicationError, WaitInterruptedError


def test_a_failed_group_operation_is_named_or_an_interruption() -> None:
    def failing() -> object:
        raise RuntimeError("socket closed\nC++ frames")

    stopped = threading.Event()
    operations = Operations(dist.ProcessGroupGloo(dist.HashStore(), 0, 1), "rank 0", stopped)
    with pytest.raises(CommunicationError, match=r"^rank 0: send number 1 failed: socket closed$"):
        operations.start("send", failing)
    stopped.set()
    with pytest.raises(WaitInterruptedError):
        operations.run("send", failing)
