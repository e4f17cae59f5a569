"""Vectors of whole texts: an encoder with the pooling that its folder says it was trained with.

The folder is laid out as the sentence-transformers library does it: ``modules.json`` names the
parts, ``1_Pooling/config.json`` the way tokens become one vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from spanwise.errors import ModelError

_PARTS = ("Transformer", "Pooling", "Normalize")
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}


class SentenceEncoder(nn.Module):
    """An encoder that gives one vector for each text, ``embedding`` ``[items, hidden]``."""

    def __init__(self, encoder: nn.Module, mode: str, normalize: bool) -> None:
        super().__init__()
        self.encoder, self.mode, self.normalize = encoder, mode, normalize
        self.config = encoder.config
        self.training = encoder.training

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """All inputs ``[items, tokens]``."""
        options = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options
        ).last_hidden_state
        pooled = pool(states, attention_mask, self.mode)
        return {"embedding": nn.functional.normalize(pooled) if self.normalize else pooled}


def pool(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector of states ``[items, tokens, hidden]`` where the mask ``[items, tokens]`` is 1."""
    wide = mask[..., None].to(states.dtype)
    if mode == "cls":
        return states[:, 0]
    if mode == "last":
        last = mask.sum(1, keepdim=True) - 1
        return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))[:, 0]
    if mode == "max":
        return states.masked_fill(wide == 0, float("-inf")).amax(1)
    total, count = (states * wide).sum(1), wide.sum(1).clamp(min=1e-9)
    return total / (count if mode == "mean" else count.sqrt())


def read_pooling(folder: Path) -> tuple[str, bool] | None:
    """How the folder's encoder is pooled, and whether vectors are normalised; None if it is not.

    Raises ModelError for a part that is not known.
    """
    listed = _read(folder / "modules.json")
    if listed is None:
        return None
    kinds = {str(part.get("type", "")).rpartition(".")[2]: part for part in listed}
    if unknown := [kind for kind in kinds if kind not in _PARTS]:
        raise ModelError(
            f"modules.json of {folder.name} has a part of kind {unknown[0]}, which is not "
            f"supported; {', '.join(_PARTS)} are"
        )
    if "Pooling" not in kinds:
        return None
    config = _read(folder / str(kinds["Pooling"].get("path", "")) / "config.json") or {}
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ModelError(
            f"the pooling of {folder.name} is {' and '.join(modes) or 'not said'}; one of "
            f"{', '.join(_MODES)} is supported"
        )
    return _MODES[modes[0]], "Normalize" in kinds


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(f"{path} cannot be read ({error}); repair or replace it") from error
