"""What one rank holds of a part of a module: slices of its tensors, and its counts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spanwise.model.parallel import replace_forward

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Setting:
    """A value that an attribute of a module has on one rank."""

    module: nn.Module
    name: str
    value: object


@dataclass(frozen=True)
class TensorSlice:
    """Of a module's parameter or buffer, the ``ranges`` of one dim that a rank holds."""

    module: nn.Module
    name: str
    dim: int
    ranges: Ranges

    def setting(self) -> Setting:
        """The slice, over the memory of the whole where it is one piece."""
        whole = getattr(self.module, self.name)
        kept = slices(whole.detach(), self.dim, self.ranges)
        if isinstance(whole, nn.Parameter):
            return Setting(self.module, self.name, nn.Parameter(kept, requires_grad=False))
        return Setting(self.module, self.name, kept)


@dataclass(frozen=True)
class Share:
    """One rank's share of a part. ``entering``: the columns it gives the linear that sums."""

    tensors: tuple[TensorSlice, ...]
    counts: tuple[Setting, ...]
    entering: Ranges

    def settings(self) -> Iterator[Setting]:
        """All that is set where the share takes the place of the whole."""
        yield from (tensor.setting() for tensor in self.tensors)
        yield from self.counts


def slices(tensor: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    """The ranges of one dim side by side; a view where they are one."""
    parts = [tensor.narrow(dim, start, end - start) for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def column_share(linear: nn.Module, ranges: Ranges) -> Share:
    """A linear that gives only some of its columns."""
    transposed = isinstance(linear, Conv1D)
    tensors = [TensorSlice(linear, "weight", 1 if transposed else 0, ranges)]
    if linear.bias is not None:
        tensors.append(TensorSlice(linear, "bias", 0, ranges))
    width = sum(end - start for start, end in ranges)
    count = Setting(linear, "nf" if transposed else "out_features", width)
    return Share(tuple(tensors), (count,), ())


def row_share(linear: nn.Module, ranges: Ranges) -> Share:
    """A linear that takes only some columns, and gives a part of its sum."""
    transposed = isinstance(linear, Conv1D)
    width = sum(end - start for start, end in ranges)
    count = Setting(linear, "nx" if transposed else "in_features", width)
    weight = TensorSlice(linear, "weight", 0 if transposed else 1, ranges)
    return Share((weight,), (count,), ranges)


def joined(shares: Iterable[Share]) -> Share:
    """Several as one; one of them takes columns in."""
    parts = list(shares)
    return Share(
        tuple(tensor for part in parts for tensor in part.tensors),
        tuple(count for part in parts for count in part.counts),
        tuple(each for part in parts for each in part.entering),
    )


def apply(share: Share) -> None:
    """Let the modules hold the share, in memory of its own, for good."""
    for setting in share.settings():
        value = setting.value
        if isinstance(value, nn.Parameter):
            value = nn.Parameter(_own(value), requires_grad=False)
        elif isinstance(value, torch.Tensor):
            value = _own(value)
        setattr(setting.module, setting.name, value)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def on_trial(
    shares: Sequence[Share], forwards: Sequence[tuple[nn.Module, object]]
) -> Iterator[None]:
    """Let the modules hold the shares and compute by ``forwards``, then be as they were."""
    with ExitStack() as undo:
        for share in shares:
            for setting in share.settings():
                before = getattr(setting.module, setting.name)
                undo.callback(setattr, setting.module, setting.name, before)
                setattr(setting.module, setting.name, setting.value)
        for module, forward in forwards:
            assert callable(forward) and "forward" not in module.__dict__
            undo.callback(module.__dict__.pop, "forward")
            replace_forward(module, forward)
        yield
