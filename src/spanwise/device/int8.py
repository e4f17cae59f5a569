"""A linear in 8 bits on CPU: packed s8 weights, activations quantized to u8 token by token."""

from __future__ import annotations

from functools import cache

import torch

from spanwise.device import native
from spanwise.device.linear import fill_rows
from spanwise.device.rounding import scaled_rows
from spanwise.errors import DeviceError

# The kernel takes one zero point for a whole call; this one is the middle of u8.
_ZERO_POINT = 128
_LARGEST = 127
# Of our own kernel, device/kernels/int8.c: the panels that it reads.
_PANEL_WIDTH = 64
_INPUTS_STEP = 64
_panels: dict[tuple[int, int], bool] = {}
_DTYPES = (torch.bfloat16, torch.float32)
# Activations whose fp32 stays in a core's cache while they are quantized.
_CACHED_VALUES = 1 << 16


class Int8Linear:
    """``[..., in]`` to ``[..., out]`` in the input's dtype, with a weight rounded to 8 bits.

    ``weight`` is ``[out, in]``, ``bias`` ``[out]``, bfloat16 or float32. A row of the weight is
    ``s8 * its absmax / 127``, and a token's activations are ``(u8 - 128) * their absmax / 127``.
    Products are summed in integers, and no row's scale depends on another: a row's result has the
    same bits in every batch, and so has a column's beside any other columns. May be packed in a
    process and used in its forks.

    Raises DeviceError where torch has no such kernel, or ModelError for a weight that 8 bits
    cannot hold.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        _check_kernel()
        self._out, self._in = weight.shape
        self._steps, rounded = _quantize_weight(weight)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._offsets = _ZERO_POINT * rounded.sum(1, dtype=torch.int32)
        self._bias = bias
        self.num_bytes = self.bytes_of(self._out, self._in)
        self._address = int(torch.ops.mkldnn.data_ptr(self._packed))
        self.most_few_rows = native.int8_most_rows() if self._has_panels() else 0

    @staticmethod
    def bytes_of(num_out: int, num_in: int) -> int:
        """Bytes of a weight ``[num_out, num_in]`` in this form, with what it has for each row."""
        return num_out * (num_in * torch.int8.itemsize + 8)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Quantize the tokens, multiply, and scale back."""
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], self._out)
        rows = hidden.reshape(-1, self._in)
        is_few = rows.shape[0] <= self.most_few_rows and rows.dtype == torch.bfloat16
        out = self._few_rows(rows) if is_few else self._many_rows(rows)
        return out.view(*hidden.shape[:-1], self._out)

    def _many_rows(self, rows: torch.Tensor) -> torch.Tensor:
        steps, tokens = _quantize_tokens(rows)
        packed = (self._packed, self._steps, _zeros(self._out))
        # For the same reason as in ``PackedLinear``.
        out = _multiply(fill_rows(tokens), *packed, rows.dtype)[: rows.shape[0]].mul_(steps)
        return out if self._bias is None else out.add_(self._bias)

    def _few_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """By our own kernel, which reads the same weight faster, to the same bits."""
        tokens, token_steps = native.int8_quantize(rows)
        scales = (self._steps, self._offsets, token_steps, self._bias)
        out = torch.empty(rows.shape[0], self._out, dtype=rows.dtype)
        native.int8_linear(self._address, tokens, *scales, out)
        return out

    def _has_panels(self) -> bool:
        """Whether oneDNN packed as our kernel reads, by what comes of it; once for each shape."""
        shape = (self._out, self._in)
        if shape not in _panels:
            _panels[shape] = bool(native.int8_most_rows()) and self._gives_the_same()
        return _panels[shape]

    def _gives_the_same(self) -> bool:
        columns = -(-self._out // _PANEL_WIDTH) * _PANEL_WIDTH
        is_short = torch.ops.mkldnn._nbytes(self._packed) < columns * self._in
        if is_short or self._in % _INPUTS_STEP:
            return False
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, self._in, generator=generator).bfloat16()
        return torch.equal(self._few_rows(drawn), self._many_rows(drawn))

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` and ``[rows, in]`` to ``[rows, out]``."""
        return self(hidden).add_(residual)


def _quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each row ``[out]`` in fp32, and the weight in s8. Raises ModelError."""
    steps, placed = scaled_rows(weight, _LARGEST, "int8", _DTYPES)
    return steps, placed.round_().to(torch.int8)


def _quantize_tokens(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``[..., in]`` the step of each token ``[..., 1]``, and u8 in 1..255 around 128."""
    if hidden.numel() <= _CACHED_VALUES:
        return _round_tokens(hidden)
    width = hidden.shape[-1]
    parts = torch.split(hidden.reshape(-1, width), max(1, _CACHED_VALUES // width))
    steps, tokens = (torch.cat(part) for part in zip(*map(_round_tokens, parts), strict=True))
    return steps.view(*hidden.shape[:-1], 1), tokens.view(hidden.shape)


def _round_tokens(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In few operations, since at decode each costs more than its work, that have vector code.

    Norms, fused multiply-adds and u8 conversions of fp32 are several times slower than these. A
    token of zeros gets any u8; its step of 0 makes the products 0 again.
    """
    placed = hidden.to(torch.float32, copy=True)
    # A step of the input's dtype scales the output in one operation. In bf16 it is up to 1/256 too
    # small, which rounding still takes in: 127 * (1 + 1/256) < 127.5.
    steps = placed.abs().amax(-1, keepdim=True).to(hidden.dtype).div_(_LARGEST)
    # The conversion cuts fractions off; the half makes a rounding of it.
    placed.div_(steps).add_(_ZERO_POINT + 0.5)
    return steps, placed.to(torch.int32).to(torch.uint8)


@cache
def _zeros(num_out: int) -> torch.Tensor:
    """A weight's zero points, which the kernel wants to be told of."""
    return torch.zeros(num_out, dtype=torch.int32)


def _multiply(
    tokens: torch.Tensor,
    packed: torch.Tensor,
    steps: torch.Tensor,
    zero_points: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(tokens - 128) @ weight.T * steps``: summed in integers, rounded to ``dtype`` at the end.

    ``tokens`` are u8, and not only because 128 is: s8 has no kernel but the reference one.
    """
    # fmt: off
    out: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        tokens, 1.0, _ZERO_POINT, packed, steps, zero_points,
        None, 1.0, 0, dtype, "none", [], "",
    )
    # fmt: on
    return out


@cache
def _check_kernel() -> None:
    """Raise DeviceError where the kernel is missing, or is not exact.

    CPUs without VNNI add pairs of products in 16 bits, where large ones are cut off.
    """
    ops = torch.ops.onednn
    if not (torch._C._has_mkldnn and hasattr(ops, "qlinear_prepack")):
        raise DeviceError(
            f"torch {torch.__version__} has no oneDNN int8 linears; leave --quantization out"
        )
    width = 64
    tokens = torch.tensor([[255], [1]], dtype=torch.uint8).expand(2, width).contiguous()
    weight = torch.full((width, width), _LARGEST, dtype=torch.int8)
    ones, zeros = torch.ones(width), torch.zeros(width, dtype=torch.int32)
    out = _multiply(tokens, ops.qlinear_prepack(weight, None), ones, zeros, torch.float32)
    right = torch.tensor([[_LARGEST], [-_LARGEST]]) * _LARGEST * float(width)
    if not torch.equal(out, right.expand(2, width)):
        raise DeviceError(
            "this CPU multiplies int8 inexactly, as those without VNNI do; leave --quantization out"
        )
