"""Logits where only some tokens may be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spanwise.runner.mass import slabs

_WORD = 8


def packed_masks(allowed: Sequence[bytes]) -> torch.Tensor:
    """Masks of one length, made on the host, as int64 ``[masks, words]``: they travel packed.

    A mask has bit ``i % 8`` of byte ``i // 8`` set for token ``i``; its bytes are as many as the
    vocabulary needs.
    """
    if not allowed:
        return torch.empty(0, 0, dtype=torch.int64)
    size = -(-len(allowed[0]) // _WORD) * _WORD
    joined = bytearray(b"".join(mask.ljust(size, b"\0") for mask in allowed))
    return torch.frombuffer(joined, dtype=torch.int64).view(len(allowed), -1)


def keep_allowed(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Forbid, in place, all tokens but the allowed ones in these rows of logits [rows, vocab].

    ``masks``: one for each of the ``rows``, of ``packed_masks``, on the device of the logits, as
    are the rows. An allowed token can be drawn whatever it had before, -inf or NaN; it then is the
    least likely.
    """
    for slab in slabs(len(rows), logits.shape[1], logits.device):
        part = rows[slab]
        values = logits[part].nan_to_num_(nan=torch.finfo(logits.dtype).min)
        forbidden = _unpacked(masks[slab])[:, : logits.shape[1]].logical_not_()
        logits[part] = values.masked_fill_(forbidden, -torch.inf)


def _unpacked(masks: torch.Tensor) -> torch.Tensor:
    """Bits as bools [masks, bits]."""
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (masks.view(torch.uint8)[..., None] & values).ne(0).flatten(1)
