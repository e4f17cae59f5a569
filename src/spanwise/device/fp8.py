"""A linear in 8-bit floats on cards: e4m3 weights, activations quantized token by token.

The format is that of Micikevicius et al. 2022, "FP8 formats for deep learning": 4 bits of exponent,
3 of mantissa, none for infinity. Cards of compute capability 8.9 and above multiply it.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device.fused_cuda import quantized
from spanwise.device.rounding import FP8, LARGEST_FP8, scaled_rows
from spanwise.errors import DeviceError, reason

_DTYPE = torch.bfloat16  # the kernels' output, with every version of cuBLAS
# What the kernels want the sizes of a weight to be a multiple of.
_ALIGNMENT = 16


class Fp8Linear:
    """``[..., in]`` to ``[..., out]`` in bfloat16, with a weight rounded to e4m3.

    ``weight`` is ``[out, in]``, ``bias`` ``[out]``, bfloat16. A row of the weight is ``e4m3 * its
    absmax / 448``, and so is a token: no row's scale depends on another. Products are summed in
    float32, and scaled there. Sizes are filled with zeros to multiples of 16, as the kernels want
    them: a rank's share of a weight may have any.

    Raises DeviceError where torch has no such kernel, or ModelError for a weight that the format
    cannot hold.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        _check_kernel(weight.device)
        self._out, self._in = weight.shape
        steps, placed = scaled_rows(weight, LARGEST_FP8, "fp8", (_DTYPE,))
        more_out, more_in = -self._out % _ALIGNMENT, -self._in % _ALIGNMENT
        self._weight = F.pad(placed, (0, more_in, 0, more_out)).to(FP8)
        self._steps = F.pad(steps, (0, more_out))[None]
        self._bias = None if bias is None else F.pad(bias, (0, more_out))
        self.num_bytes = self.bytes_of(self._out, self._in)

    @staticmethod
    def bytes_of(num_out: int, num_in: int) -> int:
        """Bytes of a weight ``[num_out, num_in]`` in this form, with its steps."""
        num_out, num_in = num_out + -num_out % _ALIGNMENT, num_in + -num_in % _ALIGNMENT
        return num_out * (num_in * FP8.itemsize + torch.float32.itemsize)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Quantize the tokens, multiply, scale back and add the bias."""
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], self._out)
        steps, tokens = quantized(hidden.reshape(-1, self._in), self._weight.shape[1])
        out = _multiply(tokens, self._weight, steps, self._steps, self._bias)
        return out[:, : self._out].view(*hidden.shape[:-1], self._out)

    def add_to(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` and ``[rows, in]`` to ``[rows, out]``."""
        return self(hidden).add_(residual)


def _multiply(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    token_steps: torch.Tensor,
    weight_steps: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``(tokens @ weight.T) * token_steps * weight_steps + bias``, rounded once at the end.

    ``weight`` ``[out, in]``, ``weight_steps`` ``[1, out]``. Without "fast accumulation", which on
    some cards keeps 14 bits of the sums.
    """
    out: torch.Tensor = torch._scaled_mm(
        tokens, weight.t(), token_steps, weight_steps, bias=bias, out_dtype=_DTYPE
    )
    return out


@cache
def _check_kernel(device: torch.device) -> None:
    """Raise DeviceError where the kernel is missing or wrong; the first weight waits for it."""
    numbers = torch.arange(48.0, device=device) % 9 - 4  # exact, and so is every sum of products
    tokens, weight = numbers.view(3, 16), numbers.view(16, 3).repeat(1, 6)[:, :16].contiguous()
    steps, weight_steps = 2.0 ** numbers[20:23, None], 2.0 ** numbers[None, 16:32]
    right = (tokens @ weight.t()) * steps * weight_steps
    try:
        found = _multiply(tokens.to(FP8), weight.to(FP8), steps, weight_steps, None)
        fault = "" if torch.equal(found, right.to(_DTYPE)) else "the product is wrong"
    except (RuntimeError, ValueError, AttributeError) as error:
        fault = reason(error)
    if fault:
        raise DeviceError(
            f"torch {torch.__version__} has no fp8 linears on {device} ({fault}); leave "
            "--quantization out"
        )
