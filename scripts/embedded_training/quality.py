"""How well a model predicts text it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text, all of it: bytes, tokens and nats."""

    bytes: int
    tokens: int
    nats: float

    @property
    def per_byte(self) -> float:
        """Perplexity per byte."""
        return math.exp(self.nats / self.bytes)

    @property
    def per_token(self) -> float:
        """Perplexity per token."""
        return math.exp(self.nats / self.tokens)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int
) -> Quality:
    """Quality on the first `limit` bytes of the texts.

    Windows of 1024 tokens, half of which is context that was scored before; the first window
    of a text has no context but <|bos|>.
    """
    size = tokens = 0
    nats = 0.0
    for text in texts:
        text = text.encode()[: max(0, limit - size)].decode(errors="ignore")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for start in range(0, max(1, len(ids) - 512), 512):
            window = ids[start : start + 1024]
            first = 512 if start else 1  # the first id to score
            with torch.no_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0]
            scored = functional.cross_entropy(
                logits[first - 1 : -1].float(), window[first:], reduction="sum"
            )
            nats += scored.item()
        size += len(text.encode())
        tokens += len(ids) - 1
    return Quality(size, tokens, nats)
