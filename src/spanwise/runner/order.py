"""Floats as whole numbers in the same order, to be packed with an index into one sort key."""

from __future__ import annotations

import torch


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Map fp32 values to int64 numbers of 32 bits that compare as the values do; no NaN."""
    bits = (values + 0.0).view(torch.int32)  # the sum makes -0.0 equal to 0.0
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
