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
_FEW_ROWS = 16
# A smaller weight stays in a core's cache: packing gains little, and a kernel is compiled as ever.
_LEAST_BYTES = 1 << 20


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

        Rows of zeros go along up to the next number of a grid. oneDNN compiles a kernel for every
        number of rows: 2 to 15 ms and up to 1.4 MB for each shape of weight. And one row alone has
        a kernel of its own, whose sums have another order than all others.
        """
        rows = hidden.reshape(-1, self._in)
        count = rows.shape[0]
        if not count:
            return hidden.new_empty((*hidden.shape[:-1], self._out))
        filled = fill_rows(rows)
        out: torch.Tensor = self._apply(filled, self._weight, self._bias, "none", [], "")
        return out[:count].view(*hidden.shape[:-1], self._out)


def num_filled_rows(num_rows: int) -> int:
    """The next number of rows that kernels are compiled for: some 27 of them up to 512.

    At most an eighth more, but for the first few, where the weight's bytes are what takes time.
    """
    if num_rows <= _FEW_ROWS:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = max(_FEW_ROWS, (1 << (num_rows - 1).bit_length()) // _FEW_ROWS)
    return -(-num_rows // step) * step


def fill_rows(rows: torch.Tensor) -> torch.Tensor:
    """``[n, in]`` with rows of zeros up to ``num_filled_rows``."""
    missing = num_filled_rows(rows.shape[0]) - rows.shape[0]
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The fastest form of a linear ``[out, in]`` on the device where it lies."""
    if weight.nbytes >= _LEAST_BYTES and can_pack(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there, and fast, for tensors of this kind."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not weight.numel():
        return False
    if not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
