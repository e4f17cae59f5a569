"""Tensors as the bytes that travel between processes."""

from __future__ import annotations

import torch

from spanwise.errors import InputError
from spanwise.types.forward import TensorData

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def to_tensor(data: TensorData) -> torch.Tensor:
    """The tensor, over the bytes themselves: it must not be written to. Raises InputError."""
    dtype = _DTYPES.get(data.dtype)
    if dtype is None:
        raise InputError(
            f"input '{data.name}' is of dtype {data.dtype!r:.40}; use one of {', '.join(_DTYPES)}"
        )
    count = 1
    for size in data.shape:
        count *= size
    if len(data.data) != count * dtype.itemsize:
        raise InputError(
            f"input '{data.name}' has {len(data.data)} bytes, {list(data.shape)} of {data.dtype} "
            f"takes {count * dtype.itemsize}"
        )
    if not count:
        return torch.empty(data.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data.data), dtype=dtype).reshape(data.shape)


def from_tensor(name: str, tensor: torch.Tensor) -> TensorData:
    """The bytes of a tensor, wherever it lies."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return TensorData(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)
