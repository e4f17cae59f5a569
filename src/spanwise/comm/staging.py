"""Page-locked host memory for what a card gives and takes.

Such memory is recycled by torch, which does not hand it out again before a copy from it that
nobody waited for is over.
"""

from __future__ import annotations

import torch


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Empty host memory of a card's tensor's shape and dtype, contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the host what is or will be computed; over when this returns. CPU: the tensor."""
    return tensor.contiguous() if tensor.is_cpu else host_like(tensor).copy_(tensor)
