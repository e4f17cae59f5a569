"""What records a step where there is no card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Compute = Callable[[], torch.Tensor]
_ATEN = torch.ops.aten
# A wait for a value, or a size that depends on one: a card refuses them while it records.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Rerun:
    """Does the work again, from the start."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = self.num_dropped = 0
        self.room = True

    def has_room(self) -> bool:
        return self.room

    def record(self, compute: Compute) -> Compute:
        self.num_recorded += 1
        again = self._again(compute)

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return again()

        return replay

    def drop(self) -> None:
        self.num_dropped += 1

    def _again(self, compute: Compute) -> Compute:
        return compute


class Tape(Rerun):
    """Notes the operations and does these again, on the same memory, as a CUDA graph would.

    Nothing of Python runs then: a number it read would be the first step's for ever. Cannot see
    what leaves torch: communicators over shared memory, kernels called by address.
    """

    def _again(self, compute: Compute) -> Compute:
        notes = _Notes()
        with notes:
            out = compute()

        def replay() -> torch.Tensor:
            notes.play()
            return out

        return replay


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(word in func.name() for word in _WAITS):
            raise RuntimeError(f"{func} is not permitted while a step is recorded")
        given = {_storage(t) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [t for t in _tensors(result) if t.numel() and _storage(t) not in given]
        # A view stays one of what it shows.
        if made or func._schema.is_mutable:
            self._calls.append((func, args, kwargs or {}, made))
        return result

    @torch.inference_mode()
    def play(self) -> None:
        for func, args, kwargs, made in self._calls:
            found = func(*args, **kwargs)
            new = [t for t in _tensors(found) if t.numel()] if made else []
            # Those that are new memory now are the ones that were then.
            given = {_storage(t) for t in _tensors((args, kwargs))}
            new = [t for t in new if _storage(t) not in given]
            for kept, value in zip(made, new, strict=True):
                kept.copy_(value)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
