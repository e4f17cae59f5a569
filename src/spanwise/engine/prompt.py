"""What a caller may give as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import InputError

Prompt = str | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


def read_prompt(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """The text (None where there is none) and the token ids of a prompt. Raises InputError."""
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    if not isinstance(prompt, Mapping):
        raise InputError(f"a prompt is a text or a mapping, got {type(prompt).__name__}")
    given = [key for key in PROMPT_KEYS if key in prompt]
    unknown = sorted(str(key) for key in set(prompt) - set(PROMPT_KEYS))
    if len(given) != 1 or unknown:
        said = ", ".join([*given, *unknown]) or "nothing"
        raise InputError(f"a prompt has exactly one of {', '.join(PROMPT_KEYS)}; got {said:.200}")
    value = prompt[given[0]]
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise InputError(f"prompt must be a text, got {type(value).__name__}")
        return value, tokenizer.encode(value)
    if given[0] == "messages":
        return None, tokenizer.encode_chat(_messages(value))
    return None, _token_ids(value)


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise InputError("prompt_token_ids must be a list of whole numbers")
    return list(value)


def _messages(value: Any) -> list[dict[str, Any]]:
    good = isinstance(value, list) and len(value) > 0
    good = good and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not good:
        raise InputError('messages must be a non-empty list of {"role": ..., "content": ...}')
    messages: list[dict[str, Any]] = value
    return messages
