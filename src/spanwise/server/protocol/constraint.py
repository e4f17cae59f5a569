"""What an answer must match, and how requests say so."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import ConfigDict, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from spanwise.server.errors import bad_request
from spanwise.server.limits import MAX_CONSTRAINT_CHARACTERS, MAX_NAME_CHARACTERS, MAX_OPTIONS
from spanwise.server.protocol.forms import OBJECT, TEXT, by, text_or_object
from spanwise.server.protocol.strict import JsonObject, Strict, Unsupported, only_one
from spanwise.types.sampling import Grammar

ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")
_RENAMED = Unsupported(advice="use structured_outputs")
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")

ConstraintText = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_CONSTRAINT_CHARACTERS)
]
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class NamedSchema(Strict):
    """A JSON schema by name; it is kept to, whatever ``strict`` says."""

    name: SchemaName
    description: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARACTERS * 16)] | None = (
        None
    )
    json_schema: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None

    @property
    def grammar(self) -> Grammar:
        """What it stands for."""
        return schema_grammar({} if self.json_schema is None else self.json_schema)


class TextFormat(Strict):
    """Text as it comes."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object; one that fits the schema ``value``, as huggingface_hub says it."""

    type: Literal["json_object"]
    value: JsonObject | None = None

    @property
    def grammar(self) -> Grammar:
        """What it stands for."""
        return ANY_OBJECT if self.value is None else schema_grammar(self.value)


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by("type", ("text", "json_object", "json_schema")),
]


class StructuredOutputs(Strict):
    """Exactly one constraint, in vLLM's words: ``grammar`` is a Lark grammar."""

    model_config = ConfigDict(json_schema_extra=only_one(*_CONSTRAINTS))

    json_: Annotated[
        Annotated[
            Annotated[ConstraintText, Tag(TEXT)] | Annotated[JsonObject, Tag(OBJECT)],
            text_or_object("Input should be a JSON schema, as an object or as text"),
        ]
        | None,
        Field(alias="json"),
    ] = None
    regex: ConstraintText | None = None
    choice: (
        Annotated[list[ConstraintText], Field(fail_fast=True, min_length=1, max_length=MAX_OPTIONS)]
        | None
    ) = None
    grammar: ConstraintText | None = None
    json_object: Literal[True] | None = None
    structural_tag: Annotated[object, Unsupported()] = None
    whitespace_pattern: Annotated[object, Unsupported()] = None
    disable_any_whitespace: Annotated[object, Unsupported(False)] = None
    disable_additional_properties: Annotated[object, Unsupported(False)] = None
    disable_fallback: Annotated[object, Unsupported(False, True)] = None

    @model_validator(mode="after")
    def _only_one(self) -> StructuredOutputs:
        given = [self.json_, self.regex, self.choice, self.grammar, self.json_object]
        if sum(each is not None for each in given) != 1:
            raise PydanticCustomError(
                "constraints", f"Needs exactly one of {', '.join(_CONSTRAINTS)}"
            )
        return self

    @property
    def wanted(self) -> Grammar:
        """What it stands for."""
        if self.json_ is not None:
            return schema_grammar(self.json_)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("regex", "|".join(map(_literal, self.choice)))
        return ANY_OBJECT if self.grammar is None else Grammar("lark", self.grammar)


class ConstraintFields(Strict):
    """What an answer must match."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[object, _RENAMED] = None
    guided_regex: Annotated[object, _RENAMED] = None
    guided_choice: Annotated[object, _RENAMED] = None
    guided_grammar: Annotated[object, _RENAMED] = None
    guided_decoding_backend: Annotated[object, Unsupported()] = None
    guided_whitespace_pattern: Annotated[object, Unsupported()] = None

    @property
    def constraint(self) -> Grammar | None:
        """What the answer must match, if anything. Raises ApiError for two at once."""
        wanted = self.structured_outputs.wanted if self.structured_outputs else None
        asked = format_grammar(self.response_format)
        if wanted is not None and asked is not None:
            raise bad_request(
                "response_format and structured_outputs both constrain the answer; leave one out",
                "structured_outputs",
            )
        return wanted or asked


def format_grammar(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Any:
    """The grammar of a response format; None for plain text."""
    match wanted:
        case JsonObjectFormat():
            return wanted.grammar
        case JsonSchemaFormat():
            return wanted.json_schema.grammar
    return None


def schema_grammar(schema: dict[str, Any] | str) -> Grammar:
    """The grammar of a JSON schema."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar("json_schema", text)


def _literal(text: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", text)
