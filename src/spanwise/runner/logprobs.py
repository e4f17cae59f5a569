"""Log probabilities of the unmodified distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    found: list[TokenLogprobs] = []
    for slab in slabs(*logits.shape):
        found += _slab_logprobs(logits[slab].float(), token_ids[slab], num_top[slab])
    return tuple(found)


def prompt_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """``token_logprobs`` for the rows [n, vocab] of one prompt, all with the same count."""
    return token_logprobs(logits, token_ids, [num_top] * len(token_ids))


def _slab_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    scores = centred(logits)
    log_total = (fixed_mass(scores).sum(-1, keepdim=True) / UNIT).log()
    drawn = torch.tensor(token_ids, device=logits.device)[:, None]
    top_ids = _best(logits, min(max(num_top), logits.shape[1]))
    ranks = (logits > logits.gather(1, drawn)).sum(-1) + 1
    columns = zip(
        token_ids,
        (scores.gather(1, drawn) - log_total).squeeze(1).tolist(),
        ranks.tolist(),
        top_ids.tolist(),
        (scores.gather(1, top_ids) - log_total).tolist(),
        num_top,
        strict=True,
    )
    return [
        TokenLogprobs(token, logprob, rank, tuple(ids[:num]), tuple(values[:num]))
        for token, logprob, rank, ids, values, num in columns
    ]


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [rows, count] of the largest fp32 logits, best first, ties to the smaller id.

    ``topk`` leaves the order of equals open; a whole number that holds both logit and id has none.
    """
    rest = _HIGH - 1 - torch.arange(logits.shape[1], device=logits.device)
    keys = ordered(logits).mul_(_HIGH).add_(rest)
    return _HIGH - 1 - keys.topk(count).values % _HIGH
