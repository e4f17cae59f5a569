"""Filters and noise over whole rows: for a device where picking tokens out is what costs.

How many tokens are picked is known there only, so that the host would have to wait for it. The
tokens are those of the filters and of the noise that pick: scores are as in ``filters``.
"""

from __future__ import annotations

import torch

from spanwise.runner.asked import Draws
from spanwise.runner.mass import fixed_mass
from spanwise.runner.noise import gumbel_noise
from spanwise.runner.order import ordered


def filtered(scores: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Leave of each row what its top_k, then its top_p, then its min_p does; -inf elsewhere."""
    specs, vocab = draws.specs, scores.shape[1]
    most = max((spec.top_k for spec in specs if spec.top_k < vocab), default=0)
    if most > 0:
        scores = _keep_top_k(scores, draws.top_k[:, None], most)
    if any(spec.top_p < 1.0 for spec in specs):
        scores = _keep_top_p(scores, draws.top_p[:, None])
    if any(spec.min_p for spec in specs):
        scores = scores.masked_fill(scores < draws.floor[:, None], -torch.inf)
    return scores


def noisy_argmax(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Argmax [rows] of scores [rows, vocab] plus the noise of each row's key."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    return gumbel_noise(keys[:, None], ids).add_(scores).argmax(-1)


def _keep_top_k(scores: torch.Tensor, limits: torch.Tensor, most: int) -> torch.Tensor:
    best = scores.topk(most).values
    floor = best.gather(1, (limits - 1).clamp(0, most - 1))
    limited = (limits > 0) & (limits < scores.shape[1])
    return scores.masked_fill(limited & (scores < floor), -torch.inf)


def _keep_top_p(scores: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    mass = fixed_mass(scores)
    best_first = ordered(scores).neg_().argsort(dim=-1, stable=True)
    in_order = mass.gather(1, best_first)
    before = in_order.cumsum(-1) - in_order
    inside = (before < limits * mass.sum(-1, keepdim=True)) | (limits >= 1.0)
    kept = torch.zeros_like(inside).scatter_(1, best_first, inside)
    return scores.masked_fill(~kept, -torch.inf)
