"""How long a requested sequence may get, and whether it can run at all."""

from __future__ import annotations

from spanwise.errors import ContextLengthError, InputError
from spanwise.scheduler.block_table import max_positions
from spanwise.scheduler.config import SchedulerConfig
from spanwise.scheduler.request import SequenceRequest


def length_limit(request: SequenceRequest, config: SchedulerConfig) -> int:
    """The length (prompt and output) at which the sequence ends at the latest.

    A pooled prompt counts its result as one token more. Raises InputError for a request that
    could never run: bad token ids, no room for one token, more than the cache holds.
    """
    _check_tokens(request.prompt_token_ids, config.vocab_size)
    num_prompt = len(request.prompt_token_ids)
    num_known = num_prompt + len(request.output_token_ids)
    pooled = request.task != "generate"
    longest = config.max_model_len + pooled
    if num_known >= longest:
        raise ContextLengthError(
            f"the prompt has {num_known} tokens, but max_model_len {config.max_model_len} leaves "
            f"room for {longest - 1}; shorten it or raise max_model_len"
        )
    num_output = 1 if pooled else request.max_tokens
    limit = longest if num_output is None else min(longest, num_prompt + num_output)
    if limit <= num_known:
        least = num_known - num_prompt + 1
        raise InputError(f"max_tokens is {num_output}, but must be at least {least}; raise it")
    _check_cache(limit - 1, max_positions(config.cache))
    return limit


def _check_tokens(token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        raise InputError("the prompt has no tokens; give at least one")
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InputError(
                f"token id {token_id} is not in the vocabulary; use ids 0 to {vocab_size - 1}"
            )


def _check_cache(num_needed: int, num_there: int) -> None:
    if num_needed > num_there:
        raise InputError(
            f"the request may need {num_needed} tokens of KV cache, but only {num_there} fit; "
            "lower max_tokens, shorten the prompt or give the KV cache more memory"
        )
