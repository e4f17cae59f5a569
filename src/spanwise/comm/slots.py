"""The slots of a channel, seen as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from spanwise.comm.segment import Channel, Segment

_SHAPES_REMEMBERED = 64


class Slots:
    """Hands out views of a channel's slots.

    Those of recent shapes are kept: making one costs more than a small copy.
    """

    def __init__(self, segment: Segment, channel: Channel) -> None:
        self.slot_bytes = channel.slot_bytes
        whole = _bytes_of_slots(segment, channel)

        @lru_cache(_SHAPES_REMEMBERED)
        def views(dtype: torch.dtype, shape: torch.Size) -> list[torch.Tensor]:
            size = shape.numel() * dtype.itemsize
            # A view born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                return [slot[:size].view(dtype).view(shape) for slot in whole]

        self._views = views

    def views(self, dtype: torch.dtype, shape: torch.Size) -> list[torch.Tensor]:
        """Every slot of the channel as a tensor that fits one slot."""
        return self._views(dtype, shape)

    def pieces(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of ``tensor`` that fit a slot each; none for an empty tensor.

        A tensor larger than a slot must be contiguous.
        """
        if tensor.nbytes <= self.slot_bytes:
            return (tensor,) if tensor.nbytes else ()
        return torch.split(tensor.view(-1), self.slot_bytes // tensor.itemsize)


def _bytes_of_slots(segment: Segment, channel: Channel) -> list[torch.Tensor]:
    with torch.inference_mode(False):
        return [
            torch.frombuffer(
                segment.memory,
                dtype=torch.uint8,
                count=channel.slot_bytes,
                offset=channel.slots_at + index * channel.slot_bytes,
            )
            for index in range(channel.num_slots)
        ]
