"""The slots of a channel, seen as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from spanwise.comm.segment import Channel, Segment

SHAPES_REMEMBERED = 64
"""How many shapes' views are kept: making one costs more than a small copy."""

Views = Callable[[torch.dtype, torch.Size], list[torch.Tensor]]


class Slots:
    """Hands out views of a channel's slots.

    ``views(dtype, shape)`` is every slot as a tensor, which must fit; those of recent shapes are
    kept.
    """

    def __init__(self, segment: Segment, channel: Channel) -> None:
        self.slot_bytes = channel.slot_bytes
        whole = _bytes_of_slots(segment, channel)

        @lru_cache(SHAPES_REMEMBERED)
        def views(dtype: torch.dtype, shape: torch.Size) -> list[torch.Tensor]:
            return [_view(slot, dtype, shape) for slot in whole]

        self.views: Views = views
        self._whole = whole

    def view(
        self, index: int, dtype: torch.dtype, shape: torch.Size, start: int = 0
    ) -> torch.Tensor:
        """A slot from its byte ``start`` on as a tensor, which must fit; not kept."""
        return _view(self._whole[index][start:], dtype, shape)

    def pieces(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of ``tensor`` that fit a slot each; none for an empty tensor.

        A tensor larger than a slot must be contiguous.
        """
        if tensor.nbytes <= self.slot_bytes:
            return (tensor,) if tensor.nbytes else ()
        return torch.split(tensor.view(-1), self.slot_bytes // tensor.itemsize)


def _view(slot: torch.Tensor, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    # A view born in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return slot[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


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
