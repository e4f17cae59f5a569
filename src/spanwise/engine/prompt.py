"""What a caller may give as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spanwise.engine.chat import ChatOptions
from spanwise.engine.tokenizer import Tokenizer
from spanwise.errors import InputError

Prompt = str | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
# What may stand beside the messages, and what it must be.
_CHAT_KEYS: Mapping[str, tuple[type, str]] = {
    "tools": (list, "a list"),
    "documents": (list, "a list"),
    "chat_template": (str, "a text"),
    "chat_template_kwargs": (Mapping, "a mapping"),
    "add_generation_prompt": (bool, "true or false"),
    "continue_final_message": (bool, "true or false"),
    "add_special_tokens": (bool, "true or false"),
}
_TEXT_KEYS = ("add_special_tokens",)


def read_prompt(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """The text (None where there is none) and the token ids of a prompt. Raises InputError.

    A text (``{"prompt": text}``) may come with ``add_special_tokens``, true if left out. With
    ``messages`` may come ``tools``, ``documents``, ``chat_template`` and ``chat_template_kwargs``
    as transformers takes them, ``add_generation_prompt`` (true unless the final message is
    continued), ``continue_final_message`` and ``add_special_tokens`` (false). None is as if a key
    were left out.
    """
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    if not isinstance(prompt, Mapping):
        raise InputError(f"a prompt is a text or a mapping, got {type(prompt).__name__}")
    given = [key for key in PROMPT_KEYS if key in prompt]
    if len(given) != 1:
        said = ", ".join(given or map(str, prompt)) or "nothing"
        raise InputError(f"a prompt has exactly one of {', '.join(PROMPT_KEYS)}; got {said:.200}")
    kind = given[0]
    value, beside = prompt[kind], {k: v for k, v in prompt.items() if k != kind and v is not None}
    if kind == "prompt":
        _check_keys(beside, _TEXT_KEYS, kind)
        if not isinstance(value, str):
            raise InputError(f"prompt must be a text, got {type(value).__name__}")
        return value, tokenizer.encode(value, beside.get("add_special_tokens", True))
    if kind == "messages":
        _check_keys(beside, tuple(_CHAT_KEYS), kind)
        return None, tokenizer.encode_chat(_messages(value), _options(beside))
    _check_keys(beside, (), kind)
    return None, _token_ids(value)


def _check_keys(beside: Mapping[str, Any], known: tuple[str, ...], kind: str) -> None:
    for key, value in beside.items():
        if key not in known:
            takes = f"{kind} takes {', '.join(known)}" if known else "leave it out"
            raise InputError(f"{key!s:.80} cannot stand beside {kind}; {takes}")
        wanted, words = _CHAT_KEYS[key]
        if not isinstance(value, wanted):
            raise InputError(f"{key} must be {words}, got {type(value).__name__}")


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise InputError("prompt_token_ids must be a list of whole numbers")
    return list(value)


def _options(beside: Mapping[str, Any]) -> ChatOptions:
    continues = beside.get("continue_final_message", False)
    return ChatOptions(
        tools=beside.get("tools"),
        documents=beside.get("documents"),
        template=beside.get("chat_template"),
        template_kwargs=beside.get("chat_template_kwargs", {}),
        add_generation_prompt=beside.get("add_generation_prompt", not continues),
        continue_final_message=continues,
        add_special_tokens=beside.get("add_special_tokens", False),
    )


def _messages(value: Any) -> list[dict[str, Any]]:
    good = isinstance(value, list) and len(value) > 0
    good = good and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not good:
        raise InputError('messages must be a non-empty list of {"role": ..., "content": ...}')
    messages: list[dict[str, Any]] = value
    return messages
