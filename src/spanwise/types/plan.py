"""The plan protocol: what a scheduler tells every rank of a replica, and what comes back.

Prefill, chunk, decode and empty steps are the same record with other numbers: a sequence is
"computed so far" (``start``) and "wanted" (``start + count``). Rows of known sequences carry only
what changed; a sequence is introduced once an epoch by ``NewSequence``. Input tokens are those of
the introduction; a position beyond them is the token the sequence sampled there, which the ranks
learn from one another and not from the plan, so a plan may be sent before that token exists.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from spanwise.types.forward import TensorData
from spanwise.types.sampling import SamplingSpec

TaskKind = Literal["generate", "pool_last", "pool_mean", "forward"]


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """First mention of a sequence in an epoch (also after preemption): everything known of it.

    ``token_ids`` are the prompt and every token accepted so far; the first ``num_prompt`` are the
    prompt. Instead of a token, ``pool_last`` sequences give the last position's hidden state, and
    ``pool_mean`` sequences the mean over all positions. A ``forward`` item has no tokens but
    ``inputs``; it is computed by one row, and known no more after that step.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    num_prompt: int
    sampling: SamplingSpec
    task: TaskKind = "generate"
    inputs: tuple[TensorData, ...] = ()


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step: positions ``start`` to ``start + count`` are computed.

    ``length`` is how many tokens the sequence has once everything wanted so far is computed
    (``start + count`` in decode, the whole known length in a chunk of a prompt). Rotary tables that
    depend on a sequence's length look at this number alone, never at a neighbour's.
    ``new_blocks``: per cache group, the block ids appended to this sequence's block table since
    the last row that named it. Block tables grow only at the end; a windowed group's blocks that
    fell out of the window keep their place in the table and are not read again. The first row of a
    sequence starts above 0 where a prefix was found computed; a windowed group's table then begins
    with block id 0 in the places that are never read.
    ``sample``: draw a token from the logits of the last position.
    """

    sequence_id: int
    start: int
    count: int
    length: int
    new_blocks: tuple[tuple[int, ...], ...]
    sample: bool


class LanePlan(msgspec.Struct, frozen=True, array_like=True):
    """One lane's section: sequences to forget, to learn, and the rows to compute, in this order."""

    dropped: tuple[int, ...] = ()
    new: tuple[NewSequence, ...] = ()
    rows: tuple[Row, ...] = ()


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One forward of one micro-batch through every stage of a replica. Steps count up from 0."""

    epoch: int
    step: int
    lanes: tuple[LanePlan, ...]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities (of the unmodified distribution) of one position.

    ``token_id`` is the drawn (or prompt) token; ``top_ids``/``top_logprobs`` the best tokens, best
    first, ties to the smaller id. ``rank`` is 1 for the most likely token.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """What one row gave. ``token_id`` is -1 where nothing was drawn.

    ``prompt_logprobs`` belong to the prompt positions ``start + 1`` to ``start + count`` (as far as
    they are prompt) of the row; ``pooled`` is the hidden state of a pooling sequence, ``outputs``
    are what a forward item gave, ``error`` is why its batch could not be computed.
    """

    sequence_id: int
    token_id: int = -1
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: tuple[float, ...] | None = None
    outputs: tuple[TensorData, ...] | None = None
    error: str = ""


class LaneResult(msgspec.Struct, frozen=True, array_like=True):
    """The rows' outcomes, in the order of the lane's rows."""

    sampled: tuple[Sampled, ...] = ()


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step gave; ``lanes`` as in the plan."""

    epoch: int
    step: int
    lanes: tuple[LaneResult, ...]
