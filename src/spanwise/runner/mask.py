"""Logits where only some tokens may be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spanwise.device.memory import move_together
from spanwise.runner.mass import slabs


def keep_allowed(logits: torch.Tensor, rows: Sequence[int], allowed: Sequence[bytes]) -> None:
    """Forbid, in place, all tokens but the allowed ones in these rows of logits [rows, vocab].

    ``allowed`` has, for each of the rows, bit ``i % 8`` of byte ``i // 8`` set for token ``i``; the
    bytes are as many as the vocabulary needs. An allowed token can be drawn whatever it had before,
    -inf or NaN; it then is the least likely.
    """
    for slab in slabs(len(rows), logits.shape[1]):
        part = torch.tensor(rows[slab], device=logits.device)
        values = logits[part].nan_to_num_(nan=torch.finfo(logits.dtype).min)
        forbidden = _unpacked(allowed[slab], logits.device)[:, : logits.shape[1]].logical_not_()
        logits[part] = values.masked_fill_(forbidden, -torch.inf)


def _unpacked(allowed: Sequence[bytes], device: torch.device) -> torch.Tensor:
    """Bits as bools [rows, bits]; they travel to the device packed."""
    packed = torch.frombuffer(bytearray(b"".join(allowed)), dtype=torch.uint8)
    (moved,) = move_together([packed.view(len(allowed), -1, 1)], device)
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
    return (moved & values).ne(0).flatten(1)
