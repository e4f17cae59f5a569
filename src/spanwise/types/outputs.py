"""What a caller gets back."""

from __future__ import annotations

from typing import Literal

import msgspec

from spanwise.types.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "deadline", "superseded", "error"]
"""``deadline``: the request's time was up before it had its first step. ``superseded``: a newer
item of the same stream came before that. ``error``: the model could not compute the item."""


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A request with its choices, as far as they have come."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finished: bool = True
