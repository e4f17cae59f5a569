"""Which tokens may be drawn at all: top_k, then top_p, then min_p, as in transformers.

Scores are fp32 [rows, vocab], divided by the temperature, 0 at each row's likeliest token (see
``centred``); a token that may not be drawn becomes -inf. Each row has its own limit. Rows that
share a call do not touch one another: thresholds are exact and masses are sums of whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spanwise.runner.mass import fixed_mass
from spanwise.runner.order import ordered


def keep_top_k(scores: torch.Tensor, limits: Sequence[int]) -> torch.Tensor:
    """Keep each row's ``k`` best tokens, and those equal to the last of them. 0 keeps all."""
    rows = [row for row, k in enumerate(limits) if 0 < k < scores.shape[1]]
    if not rows:
        return scores
    ks = torch.tensor([limits[row] for row in rows], device=scores.device)
    best = scores[rows].topk(int(ks.max())).values
    floor = torch.full_like(scores[:, :1], -torch.inf)
    floor[rows] = best.gather(1, ks[:, None] - 1)
    return scores.masked_fill(scores < floor, -torch.inf)


def keep_top_p(scores: torch.Tensor, limits: Sequence[float]) -> torch.Tensor:
    """Keep each row's smallest set of best tokens whose mass is at least ``p`` of what is left.

    Never fewer than one; among equals the smaller ids are taken first. 1 keeps all. Holtzman et
    al. 2020, "The curious case of neural text degeneration".
    """
    rows = [row for row, p in enumerate(limits) if p < 1.0]
    if not rows:
        return scores
    limit = torch.tensor([limits[row] for row in rows], dtype=torch.float64, device=scores.device)
    kept = scores.clone()
    kept[rows] = scores[rows].masked_fill(~_nucleus(scores[rows], limit), -torch.inf)
    return kept


def keep_min_p(scores: torch.Tensor, limits: Sequence[float]) -> torch.Tensor:
    """Keep tokens at least ``p`` times as likely as the row's likeliest. 0 keeps all.

    Nguyen et al. 2024, "Turning up the heat: min-p sampling".
    """
    if not any(limits):
        return scores
    floors = [math.log(p) if p else -math.inf for p in limits]
    floor = torch.tensor(floors, dtype=scores.dtype, device=scores.device)[:, None]
    return scores.masked_fill(scores < floor, -torch.inf)


def _nucleus(scores: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Mark what ``keep_top_p`` keeps, for limits [rows] below 1; sort only what can be inside."""
    mass = fixed_mass(scores)
    total = mass.sum(-1)
    # The last token inside and the tokens after it, none of them heavier, hold more than 1 - p of
    # the mass: so it holds more than that over the vocabulary's size. Half of it allows rounding.
    least = (1 - limits) * total / (2 * scores.shape[1])
    row, token = (mass > least[:, None]).nonzero(as_tuple=True)
    best_first = (row * 2**32 - ordered(scores[row, token])).argsort(stable=True)
    token = token[best_first]  # and row stays as it is: the sort moves nothing between rows
    inside = _mass_before(mass[row, token], row, len(limits)) < (limits * total)[row]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[row, token] = inside
    return mask


def _mass_before(mass: torch.Tensor, row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sum, for values [n] grouped by row, those of the same row before each."""
    # One running sum over all rows may wrap around; differences within a row stay exact.
    before = mass.cumsum(0) - mass
    in_row = torch.bincount(row, minlength=num_rows)
    first = (in_row.cumsum(0) - in_row).clamp(max=max(len(mass) - 1, 0))
    return before - before[first][row]
