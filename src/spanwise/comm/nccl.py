"""NCCL between cards: the groups of one rank, made under an epoch and aborted with a deadline."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from spanwise.comm.communicator import Communicator, RankComm
from spanwise.comm.process_group import Backend, GroupCommunicator, GroupLink, Operations
from spanwise.comm.single import SingleCommunicator
from spanwise.errors import CommunicationError, reason

_HOST = "127.0.0.1"

# Read by torch when a group is made. Its watchdog would end the process after a failure and its
# monitor after a hang; here the supervisor decides, and survivors keep running.
_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def serve_store(listener: socket.socket, timeout_s: float = 300.0) -> TCPStore:
    """Serve the store on a socket of ``listen_on_loopback``, which is taken over, while it lives.

    It must outlive the ranks: no rank may be the one that serves.
    """
    port = listener.getsockname()[1]
    return TCPStore(
        _HOST,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect_store(port: int, timeout_s: float = 300.0) -> TCPStore:
    """Connect a rank to the store."""
    limit = timedelta(seconds=timeout_s)
    return TCPStore(_HOST, port, is_master=False, timeout=limit, wait_for_workers=False)


class NcclGroups:
    """All groups of one rank in one epoch.

    Making them is collective and blocks until every rank of a group has come. Groups are met in one
    order on all ranks (tensor-parallel, links by stage, tokens), so no two wait for each other.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        pp_size: int,
        tp_size: int,
        pp_rank: int,
        tp_rank: int,
        device: torch.device,
        timeout_s: float = 300.0,
    ) -> None:
        """``name`` is unique to the replica and the epoch, and equal on all its ranks."""
        os.environ.update(_ENVIRONMENT)
        self._store = PrefixStore(name, store)
        self._device = device
        self._timeout_s = timeout_s
        self._rank_name = f"stage {pp_rank} tp rank {tp_rank}"
        self._backends: list[Backend] = []
        self._interrupted = threading.Event()
        last = pp_size - 1
        tp = self._group(f"tp/{pp_rank}", tp_rank, tp_size)
        inbox = self._link(f"link/{pp_rank - 1}/{tp_rank}", receives=True, wanted=pp_rank > 0)
        outbox = self._link(f"link/{pp_rank}/{tp_rank}", receives=False, wanted=pp_rank < last)
        ends = last > 0 and pp_rank in (0, last)
        tokens = self._link(f"tokens/{tp_rank}", receives=pp_rank == 0, wanted=ends)
        self.comm = RankComm(tp=tp, inbox=inbox, outbox=outbox, tokens=tokens)

    def abort(self, deadline_s: float) -> None:
        """End all operations and drop the groups; for good, the next epoch makes new ones.

        Drop graphs captured on the groups, and launch nothing on them, before. All groups are
        aborted at once from threads of their own: one abort may wait for a kernel of another group.
        Raises CommunicationError past the deadline: the worker is then to be replaced.
        """
        self._interrupted.set()
        threads = [
            threading.Thread(target=backend.abort, name="nccl-abort", daemon=True)
            for backend in self._backends
        ]
        for thread in threads:
            thread.start()
        _join_all(threads, deadline_s, self._rank_name)
        self._backends.clear()

    def _group(self, name: str, rank: int, size: int) -> Communicator:
        if size == 1:
            return SingleCommunicator()
        return GroupCommunicator(self._connect(name, rank, size), rank, size)

    def _link(self, name: str, *, receives: bool, wanted: bool) -> GroupLink | None:
        return GroupLink(self._connect(name, int(receives), 2)) if wanted else None

    def _connect(self, name: str, rank: int, size: int) -> Operations:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        store = PrefixStore(name, self._store)
        try:
            nccl = dist.ProcessGroupNCCL(store, rank, size, options)
            nccl.eager_connect_single_device(self._device)
        except RuntimeError as error:
            raise CommunicationError(
                f"{self._rank_name}: NCCL group {name} of {size} on {self._device} could not be "
                f"made: {reason(error)}; two ranks on one card need shared memory instead"
            ) from error
        backend = cast(Backend, nccl)
        self._backends.append(backend)
        return Operations(backend, f"{self._rank_name} in {name}", self._interrupted)


def _join_all(threads: Sequence[threading.Thread], deadline_s: float, rank_name: str) -> None:
    end = monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - monotonic()))
    if any(thread.is_alive() for thread in threads):
        raise CommunicationError(
            f"{rank_name}: aborting NCCL took more than {deadline_s:g} s; replace this worker"
        )
