"""A line of an OpenAI batch file to what ``LLM`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from spanwise.engine.prompt import Prompt
from spanwise.errors import InputError
from spanwise.types.sampling import Grammar, SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Fields of SamplingParams that the API names alike.
_SAMPLING = frozenset(
    {"n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens"}
    | {"presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"}
    | {"skip_special_tokens", "logit_bias"}
)
# Of no effect on the answer. The model is the one that the job was begun with.
_NO_EFFECT = frozenset(
    {"model", "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"priority", "stream_options"}
)
# What a field that is not supported may be set to all the same.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "store": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
_TEMPLATE = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents")


class BatchRequest(NamedTuple):
    """One request: ``custom_id`` is the caller's name for it."""

    custom_id: str
    url: str
    prompt: Prompt
    params: SamplingParams


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


def read_custom_id(line: bytes) -> str | None:
    """The name that a line gives itself, whatever else it says; None where it has none."""
    try:
        found = msgspec.json.decode(line, type=dict[str, Any]).get("custom_id")
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if isinstance(found, str) else None


def read_request(line: bytes, defaults: Mapping[str, Any], seed: int) -> BatchRequest:
    """Read a line. ``defaults`` are sampling fields that it may leave out, ``seed`` likewise.

    Raises InputError.
    """
    try:
        read = msgspec.json.decode(line, type=_Line)
    except msgspec.ValidationError as error:
        raise InputError(
            f'{error}; a line is {{"custom_id": ..., "method": "POST", "url": "{CHAT}", '
            '"body": {...}}'
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"broken JSON ({error}); write one object a line, in UTF-8") from error
    if read.method != "POST":
        raise InputError(f"method must be POST, got {read.method!r:.80}")
    if read.url not in (COMPLETIONS, CHAT):
        raise InputError(f"url must be {COMPLETIONS} or {CHAT}, got {read.url!r:.80}")
    fields = {name: value for name, value in read.body.items() if value is not None}
    prompt = _messages(fields) if read.url == CHAT else _prompt(fields)
    params = _params(fields, {"seed": seed, **defaults}, chat=read.url == CHAT)
    return BatchRequest(read.custom_id, read.url, prompt, params)


def _prompt(fields: dict[str, Any]) -> Prompt:
    given = fields.pop("prompt", None)
    special = fields.pop("add_special_tokens", None)
    if isinstance(given, str):
        return {"prompt": given, "add_special_tokens": special}
    if isinstance(given, list) and given and all(type(each) is int for each in given):
        return {"prompt_token_ids": given}
    raise InputError("prompt must be one text, or the token ids of one; write a line for each")


def _messages(fields: dict[str, Any]) -> Prompt:
    messages = fields.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise InputError('messages must be a non-empty list of {"role": ..., "content": ...}')
    beside = {name: fields.pop(name) for name in _TEMPLATE if name in fields}
    return {"messages": [_message(each) for each in messages], **beside}


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError('a message is {"role": ..., "content": ...}')
    role = "system" if message["role"] == "developer" else message["role"]
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise InputError(f"the content of a message must be text, got {content!r:.80}")
    return {**message, "role": role, "content": content}


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise InputError(f"content of type {kind!r:.80} is not supported; send text")


def _params(fields: dict[str, Any], defaults: Mapping[str, Any], *, chat: bool) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": None} if chat else {}  # a conversation: what fits
    given |= defaults
    given |= {name: fields.pop(name) for name in _SAMPLING & fields.keys()}
    given |= _length(fields, chat)
    if (grammar := _grammar(fields.pop("response_format", None))) is not None:
        given["grammar"] = grammar
    _refuse_others(fields)
    try:
        if "logit_bias" in given:
            given["logit_bias"] = msgspec.convert(
                given["logit_bias"], dict[int, float], strict=False
            )
        return SamplingParams(**given)
    except msgspec.ValidationError as error:
        raise InputError(f"logit_bias must be token ids with numbers: {error}") from error


def _length(fields: dict[str, Any], chat: bool) -> dict[str, Any]:
    names = ("max_tokens", "max_completion_tokens") if chat else ("max_tokens",)
    found = [fields.pop(name) for name in names if name in fields]
    if found[1:] not in ([], found[:1]):
        raise InputError("max_tokens and max_completion_tokens differ; leave max_tokens out")
    return {"max_tokens": found[0]} if found else {}


def _grammar(response_format: Any) -> Grammar | None:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar("json_schema", '{"type": "object"}')
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return Grammar("json_schema", msgspec.json.encode(schema).decode())
    raise InputError(
        "response_format must be of type text, json_object, or json_schema with a schema, got "
        f"{response_format!r:.80}"
    )


def _refuse_others(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name not in _NO_EFFECT and value not in _HARMLESS.get(name, ()):
            raise InputError(f"{name!s:.80} is not supported in a batch job; leave it out")
