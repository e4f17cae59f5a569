"""Weights scaled row by row, on their way to numbers of 8 bits."""

from __future__ import annotations

import torch

from spanwise.errors import ModelError

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
TINY = torch.finfo(torch.float32).tiny
"""The least step: a row of zeros would be 0 / 0."""


def scaled_rows(
    weight: torch.Tensor, largest: float, name: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each row ``[out]`` in fp32, and the dense weight ``[out, in]`` in steps.

    No number of steps is beyond ``largest``, but for the rounding of fp32. Raises ModelError for
    other ``dtypes`` and for what has no number in the format called ``name``.
    """
    if weight.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ModelError(f"{name} linears are made of {known}, not of {weight.dtype}")
    placed = torch.empty(weight.shape, device=weight.device).copy_(weight)
    absmax = torch.linalg.vector_norm(placed, float("inf"), dim=1)
    if not bool(absmax.isfinite().all()):
        raise ModelError(f"a weight holds NaN or infinity, which {name} has no number for")
    steps = (absmax / largest).clamp_min_(TINY)
    return steps, placed.div_(steps[:, None])
