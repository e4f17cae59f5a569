"""What a step brought to one sequence."""

from __future__ import annotations

import msgspec

from spanwise.types.forward import TensorData
from spanwise.types.outputs import FinishReason
from spanwise.types.plan import TokenLogprobs


class SequenceUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """News of one sequence, each token and logprob reported once and in order.

    ``prompt_logprobs`` go on where the last update's ended; the first is that of position 1.
    ``stop_reason`` is the token id that ended a sequence with reason "stop" (None for pooling).
    ``num_cached_tokens``: how many of the prompt were found computed when the sequence began; told
    once, with its first update.
    After an update with a ``finish_reason`` the scheduler knows the sequence no more.
    """

    sequence_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: tuple[float, ...] | None = None
    outputs: tuple[TensorData, ...] | None = None
    error: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
