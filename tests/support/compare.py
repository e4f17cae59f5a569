"""Comparing answers with those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tests.support.tiny_models import VOCAB, prompts, reference, save_tiny_model

from spanwise.types.plan import TokenLogprobs

NUM_TOKENS = 32
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reference:
    """A tiny model's folder, the prompts, and what transformers makes of each alone."""

    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]


@cache
def reference_of(family: str, root: Path) -> Reference:
    """Make a tiny model of a family and its reference answers, once."""
    folder = root / family
    model = save_tiny_model(family, folder)
    given = prompts()
    answers = [reference(model, prompt, NUM_TOKENS) for prompt in given]
    return Reference(
        folder,
        given,
        [tokens for tokens, _ in answers],
        [log.log_softmax(-1) for _, log in answers],
    )


def worst_difference(
    tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[TokenLogprobs]], right: Reference
) -> float:
    """Largest difference of a logprob over the whole vocabulary, as far as tokens agree."""
    worst = 0.0
    for ours, given, wanted, expected in zip(
        tokens, logprobs, right.tokens, right.logprobs, strict=True
    ):
        for step, report in enumerate(given):
            row = torch.zeros(VOCAB)
            row[list(report.top_ids)] = torch.tensor(report.top_logprobs)
            worst = max(worst, (row - expected[step]).abs().max().item())
            if ours[step] != wanted[step]:
                break
    return worst
