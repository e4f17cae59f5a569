"""What a CTC model hears, and how much of it is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from transformers import Wav2Vec2ForCTC

from .clips import TOKENS, collate

BLANK = 0


@torch.inference_mode()
def transcribe(model: Wav2Vec2ForCTC, clips: Sequence[torch.Tensor]) -> list[str]:
    """The likeliest token of each frame, repeats as one, without blanks."""
    heard = []
    for samples in clips:  # one at a time: a measure of the model, not of its padding
        batch = collate([(samples, "")])
        frames = model(input_values=batch.values, attention_mask=batch.mask).logits[0].argmax(-1)
        tokens = [TOKENS[index] for index, _ in groupby(frames.tolist()) if index != BLANK]
        heard.append(" ".join("".join(tokens).replace("|", " ").split()))
    return heard


def word_accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """1 less the word error rate, of pairs of what was said and what was heard."""
    wrong = total = 0
    for said, heard in pairs:
        wrong += edit_distance(said.split(), heard.split())
        total += len(said.split())
    return 1 - wrong / total


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that make one of the other."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
