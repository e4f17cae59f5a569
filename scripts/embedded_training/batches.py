"""What each step trains on, and how fast it learns."""

from __future__ import annotations

import math
import random

import torch
from torch.nn import functional

from .tokenizer import BOS, SPECIAL


def rate(fraction: float) -> float:
    """The learning rate at this fraction of the time: a short warm-up, then a cosine to 0."""
    warm = 0.02
    if fraction < warm:
        return max(fraction, 0.001) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warm) / (1 - warm))))


def shape_of_batch(fraction: float) -> tuple[int, int]:
    """(rows, tokens of a row): short and few at first, long at the end."""
    if fraction < 0.4:
        return 12, 256
    if fraction < 0.8:
        return 6, 512
    return (4, 1024) if fraction < 0.97 else (2, 2048)


class Batches:
    """Rows of ids from documents in a random order, without end; each row begins with <|bos|>."""

    def __init__(self, documents: list[torch.Tensor], seed: int) -> None:
        self.documents = documents
        self.random = random.Random(seed)
        self.stream = torch.empty(0, dtype=torch.long)

    def next(self, rows: int, length: int) -> torch.Tensor:
        """The next batch: rows drawn from all over the documents, [rows, length]."""
        count = rows * (length - 1)
        if len(self.stream) < count:
            self.refill()
        taken, self.stream = self.stream[:count], self.stream[count:]
        return functional.pad(taken.view(rows, length - 1), (1, 0), value=SPECIAL.index(BOS))

    def refill(self) -> None:
        """One more pass over the documents, cut in pieces of 2047 ids in a random order."""
        self.random.shuffle(self.documents)
        ids = torch.cat(self.documents)[self.random.randrange(2047) :]
        pieces = list(ids[: len(ids) // 2047 * 2047].view(-1, 2047))
        self.random.shuffle(pieces)
        self.stream = torch.cat([self.stream, *pieces])
