"""Draw tokens: a pure function of logits, a sequence's own tokens and its sampling values.

A token is the argmax of (filtered logits / temperature + Gumbel noise), which draws from the
softmax (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The noise is a hash, so neither the
batch, nor its order, nor an earlier draw has any part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spanwise.runner.filters import keep_min_p, keep_top_k, keep_top_p
from spanwise.runner.logprobs import token_logprobs
from spanwise.runner.mask import keep_allowed
from spanwise.runner.mass import centred, slabs
from spanwise.runner.noise import MAX_NOISE, gumbel_noise, stream_key
from spanwise.runner.penalties import adjust, needs_adjusting
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import SamplingSpec

_COLDEST = 1e-30
"""Below this a temperature's inverse nears overflow; the draw has long been greedy."""
_MARGIN = 0.01
"""More than the rounding of any score, noise or sum that can still matter."""
_FEW = 16
"""Picking tokens out costs more than their noise when more than one in this many is picked."""


@dataclass(frozen=True)
class SampleRow:
    """One token to draw: the one at index ``position`` of the sequence.

    ``token_ids`` are the ``position`` tokens before it, the first ``num_prompt`` of them the
    prompt; they are read only where ``needs_adjusting(spec)``. ``allowed``: the tokens that may be
    drawn, as ``keep_allowed`` takes them; None for all.
    """

    spec: SamplingSpec
    position: int
    token_ids: Sequence[int]
    num_prompt: int
    allowed: bytes | None = None


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw one token per row of ``logits`` [rows, vocab], any float dtype; fp32 and up inside.

    Bias, minimum length and penalties come first, then what is allowed, which none of them can
    overrule (so a stop token is drawn before the minimum length where nothing else is allowed),
    then temperature, top_k, top_p, min_p. A row of temperature 0 takes the largest logit, the
    smallest id among equals. Log probabilities are those of the logits as given.
    """
    raw = logits.float()
    adjusted = _adjusted(raw, rows)
    tokens = argmax(adjusted)
    drawn = [index for index, row in enumerate(rows) if row.spec.temperature > 0]
    for slab in slabs(len(drawn), logits.shape[1]):
        part = drawn[slab]
        tokens[part] = _draw(adjusted[part], [rows[index] for index in part])
    token_ids: list[int] = tokens.tolist()
    return token_ids, _logprobs(raw, token_ids, [row.spec.logprobs for row in rows])


def _adjusted(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    changed = [index for index, row in enumerate(rows) if needs_adjusting(row.spec)]
    allowed = {index: row.allowed for index, row in enumerate(rows) if row.allowed is not None}
    if not changed and not allowed:
        return logits
    logits = logits.clone()
    for index in changed:
        row = rows[index]
        adjust(logits[index], row.spec, row.token_ids, row.num_prompt)
    keep_allowed(logits, list(allowed), list(allowed.values()))
    return logits


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Tokens [rows] of rows whose temperature is above 0."""
    specs = [row.spec for row in rows]
    heat = torch.tensor([max(spec.temperature, _COLDEST) for spec in specs], device=logits.device)
    scores = centred(logits).div_(heat[:, None])
    scores = keep_top_k(scores, [s.top_k for s in specs])
    scores = keep_top_p(scores, [s.top_p for s in specs])
    scores = keep_min_p(scores, [s.min_p for s in specs])
    keys = [stream_key(row.spec.seed, row.spec.choice, row.position) for row in rows]
    return _noisy_argmax(scores, torch.tensor(keys, device=logits.device))


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
    logits: torch.Tensor, token_ids: Sequence[int], wanted: Sequence[int]
) -> list[TokenLogprobs | None]:
    rows = [index for index, num_top in enumerate(wanted) if num_top >= 0]
    results: list[TokenLogprobs | None] = [None] * len(wanted)
    if not rows:
        return results
    ids, tops = [token_ids[index] for index in rows], [wanted[index] for index in rows]
    for index, found in zip(rows, token_logprobs(logits[rows], ids, tops), strict=True):
        results[index] = found
    return results
