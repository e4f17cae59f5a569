"""A model as far as it has been trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan


@dataclass(frozen=True)
class Trained:
    """A model with all that is written beside it.

    ``num_bytes`` and ``num_tokens`` are those of the data, once; ``held`` are the texts that were
    kept from it.
    """

    kind: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    held: list[str]
    num_bytes: int
    num_tokens: int
    progress: Progress
