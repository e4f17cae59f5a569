"""From a checked conversation to what the engine is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from spanwise.server.errors import bad_request, unsupported
from spanwise.server.protocol.messages import TemplateStyle
from spanwise.server.service import Service
from spanwise.server.tool_use import ToolUse, plan_tools
from spanwise.server.tools.parser import ToolParser
from spanwise.server.tools.tool import read_tool_choice, read_tools
from spanwise.types.sampling import Grammar
from spanwise.types.serving import EngineRequest


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is said, offered and asked for.

    ``tools`` and ``tool_choice`` are as chat requests have them, checked no further.
    ``template_keys`` stand beside the messages in a prompt; ``reasoning_effort`` and ``documents``
    are for templates that read them.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel: bool = True
    template_keys: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """The request for the engine, and how its answers are read."""

    request: EngineRequest
    tools: ToolUse | None = None

    def parser(self, answer_id: str, thinking: bool) -> ToolParser | None:
        """What finds the calls in one answer, where it may have any."""
        return None if self.tools is None else self.tools.parser(answer_id, thinking)


async def plan_conversation(
    service: Service, conversation: Conversation, request: EngineRequest
) -> Plan:
    """Complete ``request``, which has everything but its prompt. Raises ApiError, InputError."""
    tools = read_tools(conversation.tools)
    choice = read_tool_choice(conversation.tool_choice, tools)
    offered = bool(tools) and choice.mode != "none"
    prompt = await conversation_prompt(service, conversation, offered)
    if not offered:
        return Plan(msgspec.structs.replace(request, prompt=prompt))
    use = plan_tools(prompt.get("chat_template"), tools, choice, conversation.parallel)
    return await _plan_tools(service, use, request, prompt)


async def conversation_prompt(
    service: Service, conversation: Conversation, with_tools: bool
) -> dict[str, Any]:
    """The prompt that a conversation is for the engine. Raises ApiError."""
    keys = {name: each for name, each in conversation.template_keys.items() if each is not None}
    template = keys.get("chat_template") or await service.template(with_tools)
    if template is not None:
        keys["chat_template"] = template
    keys |= _variables(conversation, template or "", keys.get("chat_template_kwargs", {}))
    num_characters = sum(map(_num_characters, conversation.messages))
    await service.check_length(num_characters, "messages")
    if with_tools:
        keys["tools"] = conversation.tools
    return {"messages": list(conversation.messages), **keys}


async def _plan_tools(
    service: Service, use: ToolUse, request: EngineRequest, prompt: dict[str, Any]
) -> Plan:
    # The marks of a call may be special tokens, and are looked for in the text.
    params = msgspec.structs.replace(request.params, skip_special_tokens=False)
    if use.is_forced:
        if params.grammar is not None:
            raise bad_request(
                "tool_choice and another constraint both say what the answer must be; "
                "leave one out",
                "tool_choice",
            )
        prompt, grammar = await _forced(service, use, prompt)
        params = msgspec.structs.replace(params, grammar=grammar)
    return Plan(msgspec.structs.replace(request, prompt=prompt, params=params), use)


async def _forced(
    service: Service, use: ToolUse, prompt: dict[str, Any]
) -> tuple[dict[str, Any], Grammar]:
    """The prompt, and the grammar of an answer that must call."""
    tokenizer = await service.tokenizer()
    if use.format.thinking is None:
        return prompt, use.grammar(tokenizer, thinking=False)
    token_ids = await service.engine.tokenize(prompt)
    thinking = use.is_thinking(tokenizer, token_ids)
    return {"prompt_token_ids": token_ids}, use.grammar(tokenizer, thinking)


def _variables(
    conversation: Conversation, template: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What else the template reads. Raises ApiError for what it does not."""
    keys: dict[str, Any] = {"chat_template_kwargs": dict(given)} if given else {}
    if conversation.reasoning_effort is not None:
        if not reads(template, "reasoning_effort"):
            raise unsupported("reasoning_effort")
        effort = {"reasoning_effort": conversation.reasoning_effort}
        keys["chat_template_kwargs"] = {**given, **effort}
    if conversation.documents is not None:
        if not reads(template, "documents"):
            raise unsupported("documents")
        keys["documents"] = conversation.documents
    return keys


def reads(template: str, name: str) -> bool:
    """Whether a template may read a variable or know a word."""
    return re.search(rf"\b{name}\b", template) is not None


def style_of(template: str | None) -> TemplateStyle:
    """What a template expects, by the words it knows."""
    known = template or ""
    return TemplateStyle(
        knows_developer=reads(known, "developer"),
        reads_objects=reads(known, "tojson") or reads(known, "items"),
    )


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0
