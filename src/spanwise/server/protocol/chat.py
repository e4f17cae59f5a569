"""``/v1/chat/completions``: what a request may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from spanwise.server.errors import bad_request
from spanwise.server.limits import MAX_INPUTS, MAX_LOGPROBS, MAX_TEMPLATE_CHARACTERS
from spanwise.server.protocol.constraint import ConstraintFields
from spanwise.server.protocol.messages import Content, Messages
from spanwise.server.protocol.sampling import (
    ChoicesFields,
    MaxTokens,
    RequestFields,
    ServiceTier,
    StreamFields,
)
from spanwise.server.protocol.strict import JsonObject, Metadata, Name, Strict, Unsupported
from spanwise.server.protocol.tools import ToolChoiceField, Tools

TemplateText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEMPLATE_CHARACTERS)]
_USE_TOOLS = Unsupported(advice="use tools")


class TemplateFields(Strict):
    """How a conversation becomes a prompt."""

    chat_template: TemplateText | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None

    def template_keys(self, trusted: bool) -> dict[str, Any]:
        """What stands beside the messages in a prompt; ``trusted``: templates may be brought.

        Raises ApiError.
        """
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(self, name) is not None and not trusted:
                raise bad_request(
                    f"{name} is not allowed here; leave it out, or start the server with "
                    "--trust-request-chat-template",
                    name,
                    "unsupported_parameter",
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt cannot both be true; "
                "turn one off",
                "continue_final_message",
            )
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "add_special_tokens": self.add_special_tokens,
        }


class PredictedContent(Strict):
    """What the answer will probably be. It may speed an answer up, and changes none."""

    type: Literal["content"]
    content: Content


class ChatRequest(
    TemplateFields, ConstraintFields, ChoicesFields, StreamFields, RequestFields, Strict
):
    """The body of a chat request, in the names of the OpenAI API and of vLLM."""

    messages: Messages
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    tools: Tools | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    documents: Annotated[list[JsonObject] | None, Field(fail_fast=True, max_length=MAX_INPUTS)] = (
        None
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )

    # -- no effect on the answer
    metadata: Metadata | None = None
    prediction: PredictedContent | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: Name | None = None
    service_tier: ServiceTier | None = None
    store: Annotated[object, Unsupported(False)] = None

    # -- known, and not here
    audio: Annotated[object, Unsupported()] = None
    modalities: Annotated[object, Unsupported(["text"])] = None
    moderation: Annotated[object, Unsupported()] = None
    verbosity: Annotated[object, Unsupported("medium")] = None
    web_search_options: Annotated[object, Unsupported()] = None
    functions: Annotated[object, _USE_TOOLS] = None
    function_call: Annotated[object, _USE_TOOLS] = None
    echo: Annotated[object, Unsupported(False)] = None
    include_reasoning: Annotated[object, Unsupported(True)] = None
    thinking_token_budget: Annotated[object, Unsupported(-1)] = None
    mm_processor_kwargs: Annotated[object, Unsupported()] = None
    media_io_kwargs: Annotated[object, Unsupported()] = None
    request_id: Annotated[object, Unsupported(advice="send the header x-request-id")] = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the best tokens to report; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        self.check_stream()
        self.check_choices()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs; set it to true", "top_logprobs")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs cannot be streamed", "prompt_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise bad_request(
                "max_tokens and max_completion_tokens say different things; leave max_tokens out",
                "max_tokens",
            )
