"""Communicator and links over a backend of torch.distributed; with nccl.py its only users.

Backends are used bare: no default process group and no global state, so that a process can drop
one epoch's groups and make the next. On CUDA nothing here blocks the host except ``barrier``; a
wait is the stream's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from spanwise.comm.ordered_sum import ordered_sum
from spanwise.errors import CommunicationError, WaitInterruptedError, reason

_ONE_SHOT_BYTES = 1 << 18
_MAX_UNSENT = 8

Result = TypeVar("Result")


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> Any:
        """Have the current stream (the host on CPU) wait until it is done."""
        ...

    def is_completed(self) -> bool:
        """Whether it is done."""
        ...


class Backend(Protocol):
    """What is used of torch's NCCL and gloo backends, whose stubs leave it out."""

    def barrier(self) -> Work:
        """Meet every rank."""
        ...

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, /) -> Work: ...

    def alltoall_base(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        output_sizes: Sequence[int],
        given_sizes: Sequence[int],
        /,
    ) -> Work:
        """The r-th run of rows of ``given`` to rank r; no sizes mean equal ones."""
        ...

    def send(self, tensors: Sequence[torch.Tensor], to_rank: int, tag: int, /) -> Work:
        """Give tensors to a rank."""
        ...

    def recv(self, tensors: Sequence[torch.Tensor], from_rank: int, tag: int, /) -> Work:
        """Take tensors from a rank."""
        ...

    def abort(self) -> None:
        """End everything under way."""
        ...


class Operations:
    """Runs operations of one backend and names the rank and operation that failed.

    After ``interrupted`` was set a failure is an interruption.
    """

    def __init__(self, backend: Backend, name: str, interrupted: threading.Event) -> None:
        self.backend = backend
        self._name = name
        self._interrupted = interrupted
        self._count = 0

    def start(self, operation: str, call: Callable[[], Work]) -> Work:
        """Begin an operation; its tensors must live until the work is done."""
        self._count += 1
        return self._guard(operation, call)

    def run(self, operation: str, call: Callable[[], Work]) -> None:
        """Begin an operation and have the current stream (the host on CPU) wait for it."""
        work = self.start(operation, call)
        self._guard(operation, work.wait)

    def _guard(self, operation: str, call: Callable[[], Result]) -> Result:
        place = f"{self._name}: {operation} number {self._count}"
        if self._interrupted.is_set():
            raise WaitInterruptedError(f"{place} was interrupted")
        try:
            return call()
        except RuntimeError as error:
            if self._interrupted.is_set():
                raise WaitInterruptedError(f"{place} was interrupted") from error
            raise CommunicationError(f"{place} failed: {reason(error)}") from error


class GroupCommunicator:
    """The collectives of one group.

    Sums are taken in rank order, as everywhere, which a library's own all-reduce does not promise:
    small tensors are gathered and summed by every rank; of large ones each rank sums a share, which
    moves no more bytes than a ring would.
    """

    def __init__(self, operations: Operations, rank: int, size: int) -> None:
        self._operations = operations
        self._rank = rank
        self._size = size

    @property
    def rank(self) -> int:
        """This rank's position in the group, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in rank order, in place; float16 and bfloat16 are rounded once."""
        if tensor.numel() == 0 or self._size == 1:
            return tensor
        flat = tensor.reshape(-1)
        total = (
            self._sum(self._gather_equal(flat))
            if tensor.nbytes <= _ONE_SHOT_BYTES
            else self._sum_by_shares(flat)
        )
        return tensor.copy_(total.view_as(tensor))

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along ``dim``; rank r gives ``sizes[r]`` entries there (0 is allowed)."""
        dim %= tensor.dim()
        assert len(sizes) == self._size and tensor.shape[dim] == sizes[self._rank], (sizes, dim)
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        shapes = [torch.Size((*before, size, *after)) for size in sizes]
        longest = max(shape.numel() for shape in shapes)
        if longest == 0:
            return tensor.new_empty((*before, sum(sizes), *after))
        # One padded gather instead of a broadcast for each rank.
        rows = self._gather_equal(_padded(tensor.reshape(-1), longest))
        parts = [row[: shape.numel()].view(shape) for row, shape in zip(rows, shapes, strict=True)]
        return torch.cat(parts, dim=dim)

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Give rank s its ``sizes[rank][s]`` rows; return what the ranks give to this one."""
        assert [len(line) for line in sizes] == [self._size] * self._size, sizes
        given, taken = list(sizes[self._rank]), [line[self._rank] for line in sizes]
        assert len(tensor) == sum(given), (tensor.shape, given)
        out = tensor.new_empty((sum(taken), *tensor.shape[1:]))
        if any(map(any, sizes)) and tensor.shape[1:].numel():
            backend, rows = self._operations.backend, tensor.contiguous()
            self._operations.run(
                "all_to_all", lambda: backend.alltoall_base(out, rows, taken, given)
            )
        return out

    def barrier(self) -> None:
        """Return when every rank has come here; the host waits."""
        self._operations.run("barrier", self._operations.backend.barrier)

    def _gather_equal(self, flat: torch.Tensor) -> torch.Tensor:
        """``[entries]`` of every rank as ``[ranks, entries]``."""
        rows = flat.new_empty((self._size, flat.numel()))
        backend = self._operations.backend
        self._operations.run(
            "all_gather", lambda: backend._allgather_base(rows.view(-1), flat.contiguous())
        )
        return rows

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        return ordered_sum(rows.unbind(), out=torch.empty_like(rows[0]))

    def _sum_by_shares(self, flat: torch.Tensor) -> torch.Tensor:
        share = -(-flat.numel() // self._size)
        given = _padded(flat, share * self._size)
        taken = torch.empty_like(given)
        backend = self._operations.backend
        self._operations.run("all_reduce", lambda: backend.alltoall_base(taken, given, [], []))
        shares = self._gather_equal(self._sum(taken.view(self._size, share)))
        return shares.view(-1)[: flat.numel()]


class GroupLink:
    """One end of a link: a group of two, whose rank 0 sends and whose rank 1 receives."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._unsent: deque[tuple[Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Hand a copy on; the stream waits only while too many are under way."""
        if tensor.numel() == 0:
            return
        backend = self._operations.backend
        copy = tensor.clone(memory_format=torch.contiguous_format)
        work = self._operations.start("send", lambda: backend.send([copy], 1, 0))
        self._unsent.append((work, copy))
        while self._unsent and self._unsent[0][0].is_completed():
            self._unsent.popleft()
        if len(self._unsent) > _MAX_UNSENT:
            self._unsent.popleft()[0].wait()

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` with the next tensor and return it."""
        if out.numel() == 0:
            return out
        backend, taken = self._operations.backend, out.contiguous()
        self._operations.run("recv", lambda: backend.recv([taken], 0, 0))
        return out if taken is out else out.copy_(taken)


def _padded(flat: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, length - flat.numel()))
