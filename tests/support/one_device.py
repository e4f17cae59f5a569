"""A stand-in for a card: the meta device, and a watch over every operation.

Nothing is computed, but every tensor has a device, so an operand left on the host shows as it
would on a card, and so does a wait for a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("meta")
_ATEN = torch.ops.aten
# What moves between devices on purpose.
_MOVES = (_ATEN._to_copy.default, _ATEN.copy_.default)


class OneDevice(TorchDispatchMode):
    """Fails at an operation on tensors of the card and of the host together.

    A host tensor without dims may go along, as CUDA allows it. What a router chose is not known
    here; one choice stands for all. ``num_copies`` counts tensors that were brought to the card:
    an index left on the host is brought there, silently, by each use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _ATEN.nonzero_numpy.default:
            return [torch.empty(1, dtype=torch.long, device=CARD) for _ in range(args[0].dim())]
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()} | {
            t.device.type for t in tensors if t.device == CARD
        }
        assert len(devices) < 2 or func in _MOVES, f"{func} of tensors on {sorted(devices)}"
        result = func(*args, **(kwargs or {}))
        if func in _MOVES and result.device == CARD:
            self.num_copies += any(t.device != CARD and t.dim() > 0 for t in tensors)
        return result


class OneOfMany:
    """A communicator whose other ranks give what this one gives, on its device."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = sum(sizes)
        return tensor.new_empty(shape)

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        taken = sum(line[self.rank] for line in sizes)
        return tensor.new_empty((taken, *tensor.shape[1:]))

    def barrier(self) -> None:
        return None


class WatchedLink:
    """A link that takes and gives only tensors on the card."""

    def __init__(self, seen: Callable[[torch.Tensor], None]) -> None:
        self._seen = seen

    def send(self, tensor: torch.Tensor) -> None:
        assert tensor.device == CARD
        self._seen(tensor)

    def recv(self, out: torch.Tensor) -> torch.Tensor:
        assert out.device == CARD
        return out
