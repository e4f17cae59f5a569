"""Linears as a device computes them fastest.

On a CPU the weight is packed: reordered once, at load, to the blocks that oneDNN's kernels read
(``mkldnn._linear_pointwise``). Plain weights are reordered at every call, at half the speed or less
(see the measured facts in docs/architecture.md).
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device import native
from spanwise.device.activations import Activation, activation_name
from spanwise.device.fused_cuda import gated

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
# The number of rows the blocks are chosen for. With fewer, oneDNN may choose blocks with which its
# AMX kernels add in another order from 33 rows on; they do not promise one order even so.
_ROWS_HINT = 64
_FEW_ROWS = 16
# A smaller weight stays in a core's cache: packing gains little, and a kernel is compiled as ever.
_LEAST_BYTES = 1 << 20
# Of our own kernel, device/kernels/linear.c: which panels it knows, what it calls things.
_PANEL_WIDTHS = (32, 64)
_INPUTS_STEP = 32
_NATIVE_ACTIVATIONS = {"": 0, "silu": 1, "relu": 2, "gelu-tanh": 3}
_NATIVE_COMBINATIONS = {"add": 1, "mul": 2}
_DRAWN_ROWS = 2
_panel_widths: dict[tuple[int, int], int] = {}
_TOLERANCE = 0.02  # of the largest value: two roundings to bfloat16
# What oneDNN calls activations: a name, numbers, which algorithm. "" is none.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "": ("none", [], ""),
    "silu": ("swish", [], ""),
    "gelu-tanh": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "relu": ("relu", [], ""),
}


class Linear(Protocol):
    """A matrix and an optional bias, ready to be applied."""

    num_bytes: int

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; in float32 a row's bits depend on no other row."""
        ...

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``residual`` ``[rows, out]`` and the product of ``hidden`` ``[rows, in]``."""
        ...


class PlainLinear:
    """The weight as it was loaded."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.num_bytes = weight.nbytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(hidden, self._weight, self._bias)

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` and ``[rows, in]`` to ``[rows, out]``."""
        return residual + self(hidden)


class PackedLinear:
    """A weight ``[out, in]`` in blocks. Packed before a fork, it serves in every child.

    Rows of zeros go along up to the next number of a grid. oneDNN compiles a kernel for every
    number of rows: 2 to 15 ms and up to 1.4 MB for each shape of weight. And one row alone has a
    kernel of its own, whose sums have another order than all others.

    What follows the product is done on its way out of the kernel, in float32, which saves a pass
    through memory each: an activation, a sum, a product with something else.

    Few rows are left to a kernel of our own, which reads the same blocks faster.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = None if bias is None else bias.contiguous()
        self._out, self._in = weight.shape
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self._combine = torch.ops.mkldnn._linear_pointwise.binary
        self.num_bytes = weight.nbytes
        self._address = 0
        self._width = self._panel_width(weight.dtype)
        self.most_few_rows = native.linear_most_rows(self._width) if self._width else 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.activated(hidden, "")

    def activated(self, hidden: torch.Tensor, activation: str) -> torch.Tensor:
        """The product with a named activation, ``[..., in]`` to ``[..., out]``."""
        rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, self._in)
        if not rows.shape[0]:
            return hidden.new_empty((*hidden.shape[:-1], self._out))
        if rows.shape[0] <= self.most_few_rows and activation in _NATIVE_ACTIVATIONS:
            out = self._few_rows(rows, _NATIVE_ACTIVATIONS[activation])
        else:
            post_op = _POST_OPS[activation]
            out = self._apply(fill_rows(rows), self._weight, self._bias, *post_op)[: rows.shape[0]]
        return out if rows is hidden else out.view(*hidden.shape[:-1], self._out)

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` and ``[rows, in]`` to ``[rows, out]``."""
        return self._combined(residual, hidden, "add")

    def times(self, other: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The product of ``hidden`` ``[rows, in]``, times ``other`` ``[rows, out]``."""
        return self._combined(other, hidden, "mul")

    def _combined(self, other: torch.Tensor, hidden: torch.Tensor, how: str) -> torch.Tensor:
        if not hidden.shape[0]:
            return torch.empty_like(other)
        if hidden.shape[0] <= self.most_few_rows:
            return self._few_rows(hidden, 0, other, _NATIVE_COMBINATIONS[how])
        filled, others = fill_rows(hidden), fill_rows(other)
        out: torch.Tensor = self._combine(filled, others, self._weight, self._bias, how)
        return out[: hidden.shape[0]]

    def _few_rows(
        self,
        rows: torch.Tensor,
        activation: int,
        other: torch.Tensor | None = None,
        combine: int = 0,
    ) -> torch.Tensor:
        assert rows.shape[1] == self._in
        out = rows.new_empty(rows.shape[0], self._out)
        native.linear(self._address, self._width, rows, self._bias, other, out, activation, combine)
        return out

    def _panel_width(self, dtype: torch.dtype) -> int:
        """How wide the blocks are that oneDNN chose; 0 where our own kernel does not know them.

        The blocks are oneDNN's own affair: what is read from them is compared with what it gives,
        until they are known for the shape.
        """
        if dtype != torch.bfloat16 or self._in % _INPUTS_STEP:
            return 0
        if self._bias is not None and self._bias.dtype != dtype:
            return 0
        self._address = int(torch.ops.mkldnn.data_ptr(self._weight))
        shape = (self._out, self._in)
        width = _panel_widths.get(shape) or next(filter(self._has_panels, _PANEL_WIDTHS), 0)
        if width:
            _panel_widths[shape] = width
        return width

    def _has_panels(self, width: int) -> bool:
        read_bytes = -(-self._out // width) * width * self._in * 2
        num_bytes = int(torch.ops.mkldnn._nbytes(self._weight))
        if not native.linear_most_rows(width) or read_bytes > num_bytes:
            return False
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(_DRAWN_ROWS, self._in, generator=generator).bfloat16()
        # Without the bias, beside which the products may be small; zeros would show nothing.
        right = self._apply(drawn, self._weight, None, *_POST_OPS[""])
        own = torch.empty_like(right)
        native.linear(self._address, width, drawn, None, None, own, 0, 0)
        difference, largest = (own.float() - right.float()).abs().max(), right.abs().max()
        return bool(largest > 0 and difference <= _TOLERANCE * largest)


class JoinedGate:
    """The gated half of an MLP, ``activation(gate(x)) * up(x)``, of one product for both."""

    def __init__(self, joined: Linear, activation: Activation) -> None:
        self._joined, self._activation = joined, activation
        self._name = activation_name(activation)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` to ``[rows, out]``."""
        joined = self._joined(hidden)
        if self._name is not None and joined.device.type == "cuda":
            return gated(joined, self._name)
        gate, up = joined.chunk(2, dim=-1)
        return self._activation(gate).mul_(up)


class PackedGate:
    """As ``JoinedGate``, of two packed products, so that nothing is left to do after them."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, activation: str) -> None:
        self._gate, self._up, self._activation = gate, up, activation

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, in]`` to ``[rows, out]``."""
        return self._up.times(self._gate.activated(hidden, self._activation), hidden)


@cache
def num_filled_rows(num_rows: int) -> int:
    """The next number of rows that kernels are compiled for: some 27 of them up to 512.

    At most an eighth more, but for the first few, where the weight's bytes are what takes time.
    """
    if num_rows <= _FEW_ROWS:
        return max(2, 1 << (num_rows - 1).bit_length())
    step = max(_FEW_ROWS, (1 << (num_rows - 1).bit_length()) // _FEW_ROWS)
    return -(-num_rows // step) * step


def wants_filled(rows: torch.Tensor) -> bool:
    """Whether rows ``[n, in]`` on their way through packed linears are best filled before."""
    few = max(native.linear_most_rows(width) for width in _PANEL_WIDTHS)
    return rows.dtype != torch.bfloat16 or rows.shape[0] > few


def fill_rows(rows: torch.Tensor) -> torch.Tensor:
    """``[n, in]`` with rows of zeros up to ``num_filled_rows``; itself where none are missing."""
    missing = num_filled_rows(rows.shape[0]) - rows.shape[0]
    if not missing:
        return rows
    if missing > _FEW_ROWS:
        return torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))
    return torch.cat((rows, _zero_rows(rows.shape[1], rows.dtype)[:missing]))


@cache
def _zero_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Made once: at decode an operation costs more than its work."""
    return torch.zeros(_FEW_ROWS, width, dtype=dtype)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The fastest form of a linear ``[out, in]`` on the device where it lies."""
    return PackedLinear(weight, bias) if packs(weight) else PlainLinear(weight, bias)


def packs(weight: torch.Tensor) -> bool:
    """Whether the fastest form of a linear is a packed one."""
    return weight.nbytes >= _LEAST_BYTES and can_pack(weight)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there, and fast, for tensors of this kind."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not weight.numel():
        return False
    if not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
