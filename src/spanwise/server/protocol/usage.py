"""How many tokens a request took."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens`` of the prompt were not computed anew."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all prompts and all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs together."""

    prompt_tokens: int
    total_tokens: int
