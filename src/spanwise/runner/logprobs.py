"""Log probabilities of the unmodified distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spanwise.device.memory import fetch_together, move_together
from spanwise.runner.mass import UNIT, centred, fixed_mass, slabs
from spanwise.runner.order import ordered
from spanwise.types.plan import TokenLogprobs

_HIGH = 2**32


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> tuple[TokenLogprobs, ...]:
    """Each row's log probability of its token and of its ``num_top`` best ones.

    ``logits`` [rows, vocab], one token id and one count per row; counts beyond the vocabulary give
    all of it. A row's result does not depend on the other rows.
    """
    if not token_ids:
        return ()
    (tokens,) = move_together([torch.tensor(token_ids)], logits.device)
    measured = measure(logits, tokens, num_top)
    return told(token_ids, num_top, fetch_together(measured))


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """``token_logprobs`` for the rows [n, vocab] of one prompt, all with the same count."""
    return token_logprobs(logits, token_ids, [num_top] * len(token_ids))


def measure(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: Sequence[int]
) -> list[torch.Tensor]:
    """What ``told`` wants, in its order, on the device of the logits; ``tokens`` [rows] are, too.

    For each slab of rows: log probabilities and ranks [rows], the best ids and theirs [rows, most].
    """
    measured: list[torch.Tensor] = []
    for slab in slabs(logits.shape[0], logits.shape[1], logits.device):
        measured += _measure(logits[slab].float(), tokens[slab, None], max(num_top[slab]))
    return measured


def told(
    token_ids: Sequence[int], num_top: Sequence[int], measured: Sequence[torch.Tensor]
) -> tuple[TokenLogprobs, ...]:
    """Of what was measured for these tokens and counts, on the host."""
    columns: list[list[Any]] = [[], [], [], []]
    for index, part in enumerate(measured):
        columns[index % 4] += part.tolist()
    rows = zip(token_ids, *columns, num_top, strict=True)
    return tuple(
        TokenLogprobs(token, logprob, rank, tuple(ids[:num]), tuple(values[:num]))
        for token, logprob, rank, ids, values, num in rows
    )


def _measure(logits: torch.Tensor, drawn: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    scores = centred(logits)
    log_total = (fixed_mass(scores).sum(-1, keepdim=True) / UNIT).log()
    top_ids = _best(logits, min(most, logits.shape[1]))
    ranks = (logits > logits.gather(1, drawn)).sum(-1) + 1
    logprobs = (scores.gather(1, drawn) - log_total).squeeze(1)
    return logprobs, ranks, top_ids, scores.gather(1, top_ids) - log_total


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [rows, count] of the largest fp32 logits, best first, ties to the smaller id.

    ``topk`` leaves the order of equals open; a whole number that holds both logit and id has none.
    """
    rest = _HIGH - 1 - torch.arange(logits.shape[1], device=logits.device)
    keys = ordered(logits).mul_(_HIGH).add_(rest)
    return _HIGH - 1 - keys.topk(count).values % _HIGH
