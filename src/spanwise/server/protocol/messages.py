"""The conversation of a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
from pydantic import ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from spanwise.server.limits import MAX_CALLS, MAX_MESSAGES, MAX_PARTS
from spanwise.server.protocol.forms import LIST, TEXT, by, text_or_list
from spanwise.server.protocol.strict import (
    NOT_NULL,
    JsonObject,
    Name,
    Strict,
    Unsupported,
    given,
    is_deep,
)

MEDIA = "<media>"


class TextFields(Strict):
    """A stretch of text, whatever an API calls its type."""

    text: str
    prompt_cache_breakpoint: JsonObject | None = None

    @property
    def said(self) -> str:
        """The text."""
        return self.text


class TextPart(TextFields):
    """A stretch of text."""

    type: Literal["text"]


class RefusalPart(Strict):
    """An answer that the model refused, as it was given."""

    type: Literal["refusal"]
    refusal: str

    @property
    def said(self) -> str:
        """The text."""
        return self.refusal


class MediaPart(Strict):
    """Anything but text: images, sound, files. Not supported."""

    model_config = ConfigDict(json_schema_extra={"not": {}})

    type: str
    said: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: dict[str, Any]) -> Any:
        raise PydanticCustomError(
            "unsupported", "of type {type} is not supported; send text", {"type": data["type"]}
        )


class SomePart(Protocol):
    """A part of some content."""

    @property
    def said(self) -> str:
        """The text."""


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[MediaPart, Tag(MEDIA)],
    by("type", ("text", "refusal"), other=MEDIA),
]
Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[Parts, Tag(LIST)],
    text_or_list("Input should be a string or a list of parts"),
]


class CalledFunction(Strict):
    """What was called; ``arguments`` is JSON, as the model wrote it.

    ``parsed_arguments`` is what OpenAI's client made of it, and sends back with it.
    """

    name: str
    arguments: str
    parsed_arguments: JsonObject | None = None
    description: Annotated[object, Unsupported()] = None  # huggingface_hub sends its nulls back


class Call(Strict):
    """A call that the model made earlier in the conversation."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: Name | None = None


class DeveloperMessage(Strict):
    """Instructions, as newer models call them."""

    role: Literal["developer"]
    content: Content
    name: Name | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Strict):
    """What the model said or called earlier."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                given(content=NOT_NULL),
                given(refusal=NOT_NULL),
                given(tool_calls={"type": "array", "minItems": 1}),
            ]
        }
    )

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Call] | None, Field(fail_fast=True, max_length=MAX_CALLS)] = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: Annotated[list[JsonObject] | None, Field(fail_fast=True, max_length=MAX_PARTS)] = (
        None
    )
    # What OpenAI's client made of the content, what LiteLLM noted: sent back with the message.
    parsed: JsonObject | None = None
    provider_specific_fields: JsonObject | None = None
    tool_call_id: Annotated[object, Unsupported()] = None
    audio: Annotated[object, Unsupported()] = None
    function_call: Annotated[object, Unsupported()] = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise PydanticCustomError("content", "Needs content or tool_calls")
        return self


class ToolMessage(Strict):
    """What a called function gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: Name | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[DeveloperMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by("role", ("system", "developer", "user", "assistant", "tool")),
]
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


@dataclass(frozen=True)
class TemplateStyle:
    """What a chat template expects: ``knows_developer`` as a role, ``reads_objects`` as arguments.

    Templates that know nothing of developers get their words as the system's; those that write
    arguments down as they come get them as text.
    """

    knows_developer: bool
    reads_objects: bool

    def role(self, role: str) -> str:
        """The role to write."""
        return "system" if role == "developer" and not self.knows_developer else role

    def call(self, call_id: str, name: str, arguments: str) -> dict[str, Any]:
        """A call, with arguments as what they say where that is an object."""
        read: Any = arguments
        if self.reads_objects:
            try:
                read = msgspec.json.decode(arguments)
            except (msgspec.MsgspecError, RecursionError):  # the model wrote it, and may have erred
                read = arguments
        given = read if isinstance(read, dict) and not is_deep(read) else arguments
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def template_message(message: Message, style: TemplateStyle) -> dict[str, Any]:
    """A message as chat templates read it: content in one text."""
    written: dict[str, Any] = {
        "role": style.role(message.role),
        "content": None if message.content is None else said(message.content),
    }
    if message.name is not None:
        written["name"] = message.name
    if isinstance(message, ToolMessage):
        written["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if written["content"] is None:
            written["content"] = message.refusal or ""
        if message.tool_calls:
            written["tool_calls"] = [
                style.call(call.id, call.function.name, call.function.arguments)
                for call in message.tool_calls
            ]
        if (reasoning := message.reasoning_content or message.reasoning) is not None:
            written["reasoning_content"] = reasoning
    return written


def said(content: str | Sequence[SomePart]) -> str:
    """Content in one text."""
    return content if isinstance(content, str) else "\n".join(part.said for part in content)
