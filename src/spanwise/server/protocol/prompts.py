"""Texts and token ids, one or many of them."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field, StringConstraints, Tag

from spanwise.server.limits import MAX_INPUTS, MAX_PROMPT_TOKENS, MAX_PROMPTS
from spanwise.server.protocol.forms import TEXT, TEXTS, TOKEN_LISTS, TOKENS, texts_or_tokens
from spanwise.server.protocol.strict import TokenId

OnePrompt = str | list[int]

_EXPECTED = "Input should be a text, token ids, or a list of either"
_FilledText = Annotated[str, StringConstraints(min_length=1)]
_TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)
]

# A text may be empty where the model begins it with a token of its own.
Prompts = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag(TEXTS)]
    | Annotated[_TokenIds, Tag(TOKENS)]
    | Annotated[
        list[_TokenIds],
        Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        Tag(TOKEN_LISTS),
    ],
    texts_or_tokens(_EXPECTED),
]
Inputs = Annotated[
    Annotated[_FilledText, Tag(TEXT)]
    | Annotated[
        list[_FilledText], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag(TEXTS)
    ]
    | Annotated[_TokenIds, Tag(TOKENS)]
    | Annotated[
        list[_TokenIds],
        Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS),
        Tag(TOKEN_LISTS),
    ],
    texts_or_tokens(_EXPECTED),
]


def each_prompt(given: str | list[str] | list[int] | list[list[int]]) -> list[OnePrompt]:
    """One or many, as a list of many."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [cast(list[int], given)]
    return cast(list[OnePrompt], given)
