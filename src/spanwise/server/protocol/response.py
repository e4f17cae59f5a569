"""``/v1/responses``: what a request may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from spanwise.server.errors import bad_request
from spanwise.server.limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_PARTS
from spanwise.server.protocol.constraint import (
    JsonObjectFormat,
    NamedSchema,
    TextFormat,
)
from spanwise.server.protocol.forms import LIST, OBJECT, TEXT, by, text_or_list, text_or_object
from spanwise.server.protocol.messages import MEDIA, MediaPart, RefusalPart, TextFields
from spanwise.server.protocol.sampling import (
    MaxTokens,
    RequestFields,
    SamplingFields,
    ServiceTier,
)
from spanwise.server.protocol.strict import (
    JsonObject,
    Metadata,
    Name,
    Natural,
    Strict,
    Unsupported,
)
from spanwise.server.protocol.tools import FunctionName
from spanwise.server.tools.tool import MAX_TOOLS

_OTHER = "<other>"
_NO_EFFECT = Unsupported(False)
LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Other(Strict):
    """A kind of input that is known, and not here."""

    model_config = ConfigDict(json_schema_extra={"not": {}})

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: dict[str, Any]) -> Any:
        raise PydanticCustomError(
            "unsupported", "of type {type} is not supported", {"type": data["type"]}
        )


class InputText(TextFields):
    """A stretch of text."""

    type: Literal["input_text"]


class GivenText(Strict):
    """A stretch of an answer, as it was given."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[JsonObject] | None, Field(fail_fast=True, max_length=MAX_PARTS)] = (
        None
    )
    logprobs: Annotated[list[JsonObject] | None, Field(fail_fast=True)] = None

    @property
    def said(self) -> str:
        """The text."""
        return self.text


InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[GivenText, Tag("<output_text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[MediaPart, Tag(MEDIA)],
    by("type", ("input_text", "output_text", "refusal"), other=MEDIA),
]
InputContent = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[
        list[InputPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS), Tag(LIST)
    ],
    text_or_list("Input should be a string or a list of parts"),
]


class InputMessage(Strict):
    """What somebody says."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent
    id: Name | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class InputCall(Strict):
    """A call that the model made; ``arguments`` is JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Name | None = None
    status: Status | None = None


class InputCallOutput(Strict):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: Name | None = None
    status: Status | None = None


def _item_form(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None and "role" in value:
        kind = "message"
    if kind in ("message", "function_call", "function_call_output"):
        return f"<{kind}>"
    return _OTHER if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputCallOutput, Tag("<function_call_output>")]
    | Annotated[Other, Tag(_OTHER)],
    Discriminator(
        _item_form,
        custom_error_type="form",
        custom_error_message="Input should be a message, a function_call or a function_call_output",
    ),
]
Input = Annotated[
    Annotated[str, StringConstraints(min_length=1), Tag(TEXT)]
    | Annotated[
        list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), Tag(LIST)
    ],
    text_or_list("Input should be a string or a list of items"),
]


class TextSchemaFormat(NamedSchema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


TextFormatField = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[TextSchemaFormat, Tag("<json_schema>")],
    by("type", ("text", "json_object", "json_schema")),
]


class TextConfig(Strict):
    """What the answer's text must be."""

    format: TextFormatField | None = None
    verbosity: Annotated[object, Unsupported("medium")] = None


class ResponseTool(Strict):
    """A function; ``parameters`` is the JSON schema of its arguments."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class Reasoning(Strict):
    """How hard to think, for models whose template asks."""

    effort: Effort | None = None
    summary: Annotated[object, Unsupported()] = None
    generate_summary: Annotated[object, Unsupported()] = None


class ResponseStreamOptions(Strict):
    """What a stream tells beside the text."""

    include_obfuscation: Annotated[object, Unsupported(False)] = None


class ResponseRequest(SamplingFields, RequestFields, Strict):
    """The body of a request for a response; vLLM's sampling fields beside OpenAI's."""

    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool] | None, Field(fail_fast=True, max_length=MAX_TOOLS)] = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
            | Annotated[ResponseToolChoice, Tag(OBJECT)],
            text_or_object(
                "Input should be 'none', 'auto', 'required' or an object that names a function"
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    include: (
        Annotated[
            list[Literal["message.output_text.logprobs"]], Field(fail_fast=True, max_length=16)
        ]
        | None
    ) = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    reasoning: Reasoning | None = None

    # -- no effect on the answer
    metadata: Metadata | None = None
    max_tool_calls: Natural | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: Name | None = None
    service_tier: ServiceTier | None = None
    truncation: Annotated[object, Unsupported("disabled")] = None
    store: Annotated[object, _NO_EFFECT] = None
    background: Annotated[object, _NO_EFFECT] = None

    # -- known, and not here
    access_programs: Annotated[object, Unsupported()] = None
    context_management: Annotated[object, Unsupported()] = None
    conversation: Annotated[object, Unsupported()] = None
    image: Annotated[object, Unsupported()] = None
    moderation: Annotated[object, Unsupported()] = None
    previous_response_id: Annotated[object, Unsupported(advice="send the conversation again")] = (
        None
    )
    prompt: Annotated[object, Unsupported(advice="use input")] = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the best tokens to report; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.include else None

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream; set it to true", "stream_options")
        if self.top_logprobs and not self.include:
            raise bad_request(
                f'top_logprobs needs include; set it to ["{LOGPROBS}"]', "top_logprobs"
            )
