"""What stands between a layer's products on a card, each in one launch of our own Triton kernels.

At decode a launch costs more than its work, and torch takes some 30 of them a layer. A kernel is
checked once for a kind of layer against the torch operations it replaces; those are taken where it
does not give the same, and on every other device. Triton comes with torch's builds for cards;
nothing of it is imported elsewhere.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812

from spanwise.device.activations import ACTIVATIONS
from spanwise.device.rounding import FP8, LARGEST_FP8, TINY
from spanwise.errors import reason

# A row is held whole by one program; a wider one would spill.
_MOST_NORMED = 1 << 15
_MOST_GATED = 1 << 10  # columns of one program; not tuned on a card yet
_MOST_ROTATED = 1 << 10  # values of one program; likewise
# Of the largest value, what another order of sums, or one rounding elsewhere, may change.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_logger = logging.getLogger(__name__)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm (arXiv:1910.07467) of ``[rows, dim]`` or ``[tokens, heads, dim]``.

    Computed in float32. A ``weight`` ``[dim]`` of the input's dtype is applied after the rounding
    to it, one of another dtype before. Dense.
    """
    kind = NormKind(hidden.device, hidden.dtype, weight.dtype, weight.shape[0], hidden.dim(), False)
    return _normed(hidden, weight, eps) if _serves(kind) else _plain_norm(hidden, weight, eps)


def add_rms_norm(
    residual: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + hidden``, both ``[rows, dim]``, and its ``rms_norm``."""
    kind = NormKind(hidden.device, hidden.dtype, weight.dtype, weight.shape[0], hidden.dim(), True)
    if not _serves(kind):
        total = residual + hidden
        return total, _plain_norm(total, weight, eps)
    return _added_and_normed(residual, hidden, weight, eps)


def rotate_and_write(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864) for queries and keys; keys and values to their slots.

    ``heads`` ``[tokens, queries + 2 * kv_heads, dim]``. ``cos`` and ``sin`` ``[tokens, dims]``, or
    with a dim of 1 between; both halves of them have the same angles, of which the second one's
    are read. What is beyond ``dims`` stays as it is. Token i goes to ``slots[i]`` of ``keys`` and
    ``values`` ``[slots, kv_heads, dim]``. Returns ``[tokens, queries, dim]``.
    """
    kv_heads, dim = keys.shape[1:]
    num_query = heads.shape[1] - 2 * kv_heads
    shape = (num_query, kv_heads, dim, cos.shape[-1])
    kind = RotaryKind(heads.device, heads.dtype, cos.dtype, *shape)
    write = _rotated_and_written if _serves(kind) else _plain_rotate_and_write
    return write(heads, cos, sin, slots, keys, values)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` ``[rows, dim]`` of ``[rows, 2 * dim]``, the gates before the ups.

    ``activation``: a name in ``ACTIVATIONS``.
    """
    kind = GateKind(gate_up.device, gate_up.dtype, gate_up.shape[1] // 2, activation)
    gate = _gated if _serves(kind) else _plain_gated
    return gate(gate_up, activation)


def quantized(rows: torch.Tensor, num_filled: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[rows, dim]`` as 8-bit floats: the step of each in float32, and what is kept of it.

    Steps ``[rows, 1]``, each with its row's largest number at 448; e4m3 ``[rows, num_filled]``,
    zeros beyond ``dim``. A token with numbers that are none has such numbers afterwards.
    """
    kind = QuantizeKind(rows.device, rows.dtype, rows.shape[1], num_filled)
    quantize = _quantized if _serves(kind) else _plain_quantized
    return quantize(rows, num_filled)


# -- the torch operations -------------------------------------------------------------------------


def _plain_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = hidden.float()
    normed = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight.dtype == hidden.dtype:
        return normed.to(hidden.dtype) * weight
    return (normed * weight).to(hidden.dtype)


def _plain_rotate_and_write(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    tokens, kv_heads, rotated = heads.shape[0], keys.shape[1], cos.shape[-1]
    cos, above = (table.reshape(tokens, 1, rotated) for table in (cos, sin))
    above = above[..., rotated // 2 :]
    sin = torch.cat((-above, above), dim=-1)
    turning = heads[:, :-kv_heads, :rotated]
    turned = (turning * cos).addcmul_(turning.roll(rotated // 2, dims=-1), sin).to(heads.dtype)
    if rotated < heads.shape[2]:
        turned = torch.cat((turned, heads[:, :-kv_heads, rotated:]), dim=-1)
    query, key = turned[:, :-kv_heads], turned[:, -kv_heads:]
    keys.index_copy_(0, slots, key)
    values.index_copy_(0, slots, heads[:, -kv_heads:])
    return query


def _plain_gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def _plain_quantized(rows: torch.Tensor, num_filled: int) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = torch.linalg.vector_norm(rows, float("inf"), 1, keepdim=True, dtype=torch.float32)
    steps = absmax.div_(LARGEST_FP8).clamp_min_(TINY)
    tokens = (rows / steps).to(FP8)
    if num_filled > rows.shape[1]:
        missing = (0, num_filled - rows.shape[1])
        tokens = F.pad(tokens.view(torch.uint8), missing).view(FP8)
    return steps, tokens


# -- the launches ---------------------------------------------------------------------------------


def _normed(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    hidden = _with_dense_rows(hidden)
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _launch_norm(hidden, None, weight, eps, out, out)
    return out


def _added_and_normed(
    residual: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert residual.shape == hidden.shape and residual.dtype == hidden.dtype
    residual, hidden = _with_dense_rows(residual), _with_dense_rows(hidden)
    total, out = (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2)
    )
    _launch_norm(hidden, residual, weight, eps, total, out)
    return total, out


def _launch_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    out: torch.Tensor,
) -> None:
    from spanwise.device import fused_kernels

    if not hidden.numel():
        return
    dim = hidden.shape[-1]
    heads = hidden.shape[1] if hidden.dim() == 3 else 1
    block = _padded(dim)
    fused_kernels.norm_rows[(hidden.shape[0] * heads,)](
        *(hidden, hidden if residual is None else residual, weight.contiguous(), total, out),
        *(float(eps), heads),
        *(hidden.stride(0), hidden.stride(1) if heads > 1 else 0),
        0 if residual is None else residual.stride(0),
        DIM=dim,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        WEIGHT_LAST=weight.dtype == hidden.dtype,
        num_warps=_warps(block),
    )


def _rotated_and_written(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    from spanwise.device import fused_kernels

    tokens, num_heads, dim = heads.shape
    kv_heads, rotated = keys.shape[1], cos.shape[-1]
    num_query = num_heads - 2 * kv_heads
    assert heads.dtype == keys.dtype == values.dtype and cos.dtype == sin.dtype
    assert keys.shape == values.shape and keys.shape[2] == dim and rotated % 2 == 0
    assert keys.stride(2) == values.stride(2) == slots.stride(0) == 1 or not tokens
    heads = _with_dense_rows(heads)
    cos, sin = (_with_dense_rows(table.reshape(tokens, rotated)) for table in (cos, sin))
    query = torch.empty((tokens, num_query, dim), dtype=heads.dtype, device=heads.device)
    if not tokens:
        return query
    block = min(_padded(num_heads), max(1, _MOST_ROTATED // _padded(dim)))
    fused_kernels.rotate_and_write[(tokens, -(-num_heads // block))](
        *(heads, cos, sin, slots, keys, values, query),
        *heads.stride()[:2],
        *(cos.stride(0), sin.stride(0)),
        *keys.stride()[:2],
        *values.stride()[:2],
        NUM_QUERY=num_query,
        NUM_KV=kv_heads,
        DIM=dim,
        HALF=rotated // 2,
        BLOCK_HEADS=block,
        BLOCK_HALF=_padded(rotated // 2),
        BLOCK_REST=_padded(dim - rotated),
        ROUNDS=cos.dtype == heads.dtype,
        num_warps=4,
    )
    return query


def _gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    from spanwise.device import fused_kernels

    assert activation in ACTIVATIONS, activation
    gate_up = _with_dense_rows(gate_up)
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, dim), dtype=gate_up.dtype, device=gate_up.device)
    if not out.numel():
        return out
    block = min(_padded(dim), _MOST_GATED)
    fused_kernels.gate_rows[(rows, -(-dim // block))](
        *(gate_up, out, gate_up.stride(0)),
        DIM=dim,
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=4,
    )
    return out


def _quantized(rows: torch.Tensor, num_filled: int) -> tuple[torch.Tensor, torch.Tensor]:
    from spanwise.device import fused_kernels

    rows = _with_dense_rows(rows)
    steps = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=rows.device)
    out = torch.empty((rows.shape[0], num_filled), dtype=FP8, device=rows.device)
    if not out.numel():
        return steps, out
    block = _padded(num_filled)
    fused_kernels.quantize_rows[(rows.shape[0],)](
        *(rows, steps, out, rows.stride(0)),
        DIM=rows.shape[1],
        FILLED=num_filled,
        BLOCK=block,
        LARGEST=LARGEST_FP8,
        TINY=TINY,
        num_warps=_warps(block),
    )
    return steps, out


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dim is dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _padded(size: int) -> int:
    """The next power of two, which is what a program holds."""
    return 1 << max(0, size - 1).bit_length()


def _warps(block: int) -> int:
    """At most 32 values of a row in a thread, and no more warps than a block has."""
    return max(1, min(32, block // 512))


# -- the check ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormKind:
    """What the norm is compiled for, and checked for once."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    dim: int
    num_dims: int
    has_residual: bool

    name = "The fused norm"

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it at all."""
        return self.dim <= _MOST_NORMED and self.num_dims <= (2 if self.has_residual else 3)

    def worst_difference(self, draw: Draw) -> float:
        """From torch's result, as a share of the largest value; or NaN."""
        shape = (3, 2, self.dim)[3 - self.num_dims :]
        hidden, weight = draw(*shape).to(self.dtype), draw(self.dim).to(self.weight_dtype)
        if not self.has_residual:
            return _difference(_normed(hidden, weight, 1e-5), _plain_norm(hidden, weight, 1e-5))
        residual = draw(*shape).to(self.dtype)
        total, found = _added_and_normed(residual, hidden, weight, 1e-5)
        wanted = residual + hidden
        return _worst(
            _difference(total, wanted), _difference(found, _plain_norm(wanted, weight, 1e-5))
        )


@dataclass(frozen=True)
class RotaryKind:
    """What rotating and writing are compiled for, and checked for once."""

    device: torch.device
    dtype: torch.dtype
    table_dtype: torch.dtype
    num_query: int
    kv_heads: int
    dim: int
    rotated: int

    name = "Fused rotary positions"

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it at all."""
        return self.rotated % 2 == 0 and 0 < self.rotated <= self.dim <= _MOST_ROTATED

    def worst_difference(self, draw: Draw) -> float:
        """From torch's result, as a share of the largest value; or NaN."""
        tokens, slots = 3, torch.tensor([4, 0, 5], device=self.device)
        heads = draw(tokens, self.num_query + 2 * self.kv_heads, self.dim).to(self.dtype)
        cos, sin = (
            draw(tokens, self.rotated // 2).repeat(1, 2).to(self.table_dtype) for _ in range(2)
        )
        written = [draw(7, self.kv_heads, self.dim).to(self.dtype) for _ in range(2)]
        kept = [part.clone() for part in written]
        found = _rotated_and_written(heads, cos, sin, slots, written[0], written[1])
        wanted = _plain_rotate_and_write(heads, cos, sin, slots, kept[0], kept[1])
        pairs = zip((found, *written), (wanted, *kept), strict=True)
        return _worst(*(_difference(one, other) for one, other in pairs))


@dataclass(frozen=True)
class GateKind:
    """What gates are compiled for, and checked for once."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    activation: str

    name = "The fused gate"

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it at all."""
        return True

    def worst_difference(self, draw: Draw) -> float:
        """From torch's result, as a share of the largest value; or NaN."""
        gate_up = draw(3, 2 * self.dim).mul_(4.0).to(self.dtype)
        found, wanted = _gated(gate_up, self.activation), _plain_gated(gate_up, self.activation)
        return _difference(found, wanted)


@dataclass(frozen=True)
class QuantizeKind:
    """What quantizing is compiled for, and checked for once."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    num_filled: int

    name = "Fused quantizing"

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it at all."""
        return self.num_filled <= _MOST_NORMED

    def worst_difference(self, draw: Draw) -> float:
        """From torch's result, as a share of the largest value; or NaN."""
        rows = draw(3, self.dim).to(self.dtype)
        found, wanted = _quantized(rows, self.num_filled), _plain_quantized(rows, self.num_filled)
        return _worst(*(_difference(one, other) for one, other in zip(found, wanted, strict=True)))


Kind = NormKind | RotaryKind | GateKind | QuantizeKind
Draw = Callable[..., torch.Tensor]


@cache
def _serves(kind: Kind) -> bool:
    """Whether the kernel can be built here and gives what torch does.

    The first layer of a kind waits for the check; no later one does.
    """
    if kind.device.type != "cuda" or kind.dtype not in _TOLERANCE or not kind.fits:
        return False
    fault = _fault(kind)
    if not fault:
        return True
    _logger.warning(
        "%s does not work on %s (%s): torch's operations are taken instead, which is slower; see "
        "that torch and triton belong together, and that there is a C compiler",
        kind.name,
        kind.device,
        fault,
    )
    return False


def _fault(kind: Kind) -> str:
    """Why the kernel does not serve; empty where it does."""
    try:
        from spanwise.device.fused_kernels import TritonError
    except ImportError as error:
        return reason(error)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind.device)

    try:
        worst = kind.worst_difference(draw)
    # Triton builds with the host's C compiler and Python's headers, which may not be there.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return reason(error)
    is_right = worst <= _TOLERANCE[kind.dtype]
    return "" if is_right else f"its result is off by {worst:.1e} of the largest value"


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    exact = wanted.float()
    return ((found.float() - exact).abs().max() / exact.abs().max()).item()


def _worst(*differences: float) -> float:
    """The largest; NaN where any is."""
    return torch.tensor(differences).max().item()
