"""Linears as a device computes them fastest.

On a CPU the weight is packed: reordered once, at load, to the blocks that oneDNN's kernels read
(``mkldnn._linear_pointwise``). Plain weights are reordered at every call, at half the speed or less
(see the measured facts in docs/architecture.md).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
# The number of rows the blocks are chosen for. With fewer, oneDNN may choose blocks with which its
# AMX kernels add in another order from 33 rows on; they do not promise one order even so.
_ROWS_HINT = 64


class Linear(Protocol):
    """A matrix and an optional bias, ready to be applied."""

    num_bytes: int

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; in float32 a row's bits depend on no other row."""
        ...


class PlainLinear:
    """The weight as it was loaded."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.num_bytes = weight.nbytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(hidden, self._weight, self._bias)


class PackedLinear:
    """A weight ``[out, in]`` in blocks. Packed before a fork, it serves in every child."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._out, self._in = weight.shape
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self.num_bytes = weight.nbytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``.

        A single row goes with a copy of itself: oneDNN has another kernel for it, whose sums have
        another order than all others.
        """
        if hidden.numel() > self._in:
            out: torch.Tensor = self._apply(hidden, self._weight, self._bias, "none", [], "")
            return out
        shape = (*hidden.shape[:-1], self._out)
        if not hidden.numel():
            return hidden.new_empty(shape)
        row = hidden.reshape(1, self._in)
        twice = self._apply(torch.cat((row, row)), self._weight, self._bias, "none", [], "")
        single: torch.Tensor = twice[:1].view(shape)
        return single


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The fastest form of a linear ``[out, in]`` on the device where it lies."""
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there, and fast, for tensors of this kind."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not weight.numel():
        return False
    if not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
