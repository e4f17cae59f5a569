"""The groups of NCCL, over gloo: the library itself needs cards."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from tests.support.gloo_as_nccl import GlooAsNccl
from tests.support.ranks import together

from spanwise.comm import nccl
from spanwise.comm.communicator import RankComm
from spanwise.comm.store import listen_on_loopback
from spanwise.errors import CommunicationError, WaitInterruptedError


def test_nccl_groups_meet_through_a_store_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ranks form which groups, over a real store; the library itself needs cards."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", GlooAsNccl, raising=False)
    for name in nccl._ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    listener = listen_on_loopback()
    host, port = listener.getsockname()
    store = nccl.serve_store(listener)
    assert (host, store.port) == ("127.0.0.1", port)

    def call(rank: int) -> None:
        stage, tp_rank = divmod(rank, 2)
        groups = nccl.NcclGroups(
            nccl.connect_store(port),
            name="replica 0 epoch 1",
            pp_size=3,
            tp_size=2,
            pp_rank=stage,
            tp_rank=tp_rank,
            device=torch.device("cpu"),
            timeout_s=30.0,
        )
        for number in range(9):
            _around(groups.comm, number)
        groups.comm.tp.barrier()
        groups.abort(10.0)
        place = f"stage {stage} tp rank {tp_rank} in tp/{stage}: "
        with pytest.raises(WaitInterruptedError, match=place):
            groups.comm.tp.barrier()

    together([lambda rank=rank: call(rank) for rank in range(6)])
    assert {os.environ[name] for name in nccl._ENVIRONMENT} == {"0"}


def _around(comm: RankComm, number: int) -> None:
    """A tensor through three stages, doubled by each, and back to the first."""
    tensor = torch.full((5,), float(number))
    if comm.inbox is not None:
        comm.inbox.recv(tensor)
    comm.tp.all_reduce(tensor)
    if comm.outbox is not None:
        comm.outbox.send(tensor)
    elif comm.tokens is not None:
        comm.tokens.send(tensor)
    if comm.inbox is None:
        assert comm.tokens is not None
        assert comm.tokens.recv(tensor).tolist() == [8.0 * number] * 5


def test_an_abort_that_hangs_is_given_up_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", GlooAsNccl, raising=False)
    over = threading.Event()
    monkeypatch.setattr(GlooAsNccl, "abort", lambda self: over.wait(), raising=False)
    store = dist.HashStore()

    def call(rank: int) -> None:
        place = {"pp_size": 1, "tp_size": 2, "pp_rank": 0, "tp_rank": rank}
        device = torch.device("cpu")
        groups = nccl.NcclGroups(store, name="epoch 2", device=device, timeout_s=30.0, **place)
        with pytest.raises(CommunicationError, match=r"more than 0\.05 s; replace this worker"):
            groups.abort(0.05)

    try:
        together([lambda: call(0), lambda: call(1)])
    finally:
        over.set()
