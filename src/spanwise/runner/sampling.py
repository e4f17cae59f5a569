"""Draw tokens: a pure function of logits, a sequence's own tokens and its sampling values.

A token is the argmax of (filtered logits / temperature + Gumbel noise), which draws from the
softmax (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The noise is a hash, so neither the
batch, nor its order, nor an earlier draw has any part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spanwise.device.memory import fetch_together
from spanwise.runner import dense
from spanwise.runner.asked import Asked, Draws, SampleRow, gather
from spanwise.runner.filters import keep_min_p, keep_top_k, keep_top_p
from spanwise.runner.logprobs import measure, told
from spanwise.runner.mask import keep_allowed
from spanwise.runner.mass import centred, slabs
from spanwise.runner.noise import MAX_NOISE, gumbel_noise
from spanwise.runner.penalties import adjust
from spanwise.types.plan import TokenLogprobs

__all__ = ["SampleRow", "argmax", "sample"]

_MARGIN = 0.01
"""More than the rounding of any score, noise or sum that can still matter."""
_FEW = 16
"""Picking tokens out costs more than their noise when more than one in this many is picked."""


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw one token per row of ``logits`` [rows, vocab], any float dtype; fp32 and up inside.

    Bias, minimum length and penalties come first, then what is allowed, which none of them can
    overrule (so a stop token is drawn before the minimum length where nothing else is allowed),
    then temperature, top_k, top_p, min_p. A row of temperature 0 takes the largest logit, the
    smallest id among equals. Log probabilities are those of the logits as given.

    What rows ask goes to a card in one copy, what is found comes back in one, and in between
    nothing waits for it.
    """
    raw, device = logits.float(), logits.device
    asked = gather(rows, logits.shape[1], device)
    adjusted = _adjusted(raw, asked)
    tokens = argmax(adjusted)
    for slab in slabs(len(asked.draws), logits.shape[1], device):
        draws = asked.draws[slab]
        tokens[draws.rows] = _draw(adjusted[draws.rows], draws)
    num_top = [row.spec.logprobs for row in rows if row.spec.logprobs >= 0]
    scored = measure(raw[asked.scored], tokens[asked.scored], num_top) if num_top else []
    found, *measured = fetch_together([tokens, *scored])
    token_ids: list[int] = found.tolist()
    return token_ids, _logprobs(token_ids, rows, measured)


def _adjusted(logits: torch.Tensor, asked: Asked) -> torch.Tensor:
    if not asked.changes_logits:
        return logits
    logits = logits.clone()
    adjust(logits, asked.changes)
    keep_allowed(logits, asked.masked, asked.masks)
    return logits


def _draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens [rows] of rows whose temperature is above 0."""
    scores = centred(logits).div_(draws.heat[:, None])
    if not _picks(scores.device):
        return dense.noisy_argmax(dense.filtered(scores, draws), draws.keys)
    scores = keep_top_k(scores, [spec.top_k for spec in draws.specs])
    scores = keep_top_p(scores, [spec.top_p for spec in draws.specs])
    scores = keep_min_p(scores, [spec.min_p for spec in draws.specs])
    return _noisy_argmax(scores, draws.keys)


def _picks(device: torch.device) -> bool:
    """Whether it pays to pick out the few tokens that can win."""
    return device.type == "cpu"


def _noisy_argmax(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Argmax [rows] of scores [rows, vocab] plus noise; noise only for tokens that can win."""
    # The best score is 0: what lies further below its noise than noise can lift is out.
    floor = (gumbel_noise(keys, argmax(scores)) - MAX_NOISE - _MARGIN).float()
    able = scores >= floor[:, None]
    if able.count_nonzero() * _FEW > able.numel():
        ids = torch.arange(scores.shape[1], device=scores.device)
        return argmax(gumbel_noise(keys[:, None], ids).add_(scores))
    row, token = able.nonzero(as_tuple=True)
    noisy = torch.full_like(scores, -torch.inf, dtype=torch.float64)
    noisy[row, token] = scores[row, token] + gumbel_noise(keys[row], token)
    return argmax(noisy)


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """The largest of each row, the first among equals.

    On a CPU by numpy: torch takes 19 ms for 256 rows of 32,000 on one thread, numpy 2.
    """
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    return torch.from_numpy(scores.numpy().argmax(-1))


def _logprobs(
    token_ids: Sequence[int], rows: Sequence[SampleRow], measured: Sequence[torch.Tensor]
) -> list[TokenLogprobs | None]:
    scored = [index for index, row in enumerate(rows) if row.spec.logprobs >= 0]
    results: list[TokenLogprobs | None] = [None] * len(rows)
    ids, tops = [token_ids[index] for index in scored], [rows[i].spec.logprobs for i in scored]
    for index, found in zip(scored, told(ids, tops, measured), strict=True):
        results[index] = found
    return results
