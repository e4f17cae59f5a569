"""The functions that a request offers, as chat requests write them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, Tag

from spanwise.server.protocol.forms import OBJECT, TEXT, text_or_object
from spanwise.server.protocol.strict import JsonObject, Strict
from spanwise.server.tools.tool import MAX_TOOLS

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionFields(Strict):
    """One function; ``parameters`` is the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    """An entry of ``tools``."""

    type: Literal["function"]
    function: FunctionFields


class NamedFunction(Strict):
    """The function that must be called."""

    name: FunctionName


class NamedToolChoice(Strict):
    """One function, that must be called."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[FunctionTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]
ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(TEXT)]
    | Annotated[NamedToolChoice, Tag(OBJECT)],
    text_or_object("Input should be 'none', 'auto', 'required' or an object that names a function"),
]


def as_given(value: Strict | str | None) -> Any:
    """A field's value as plain JSON, without what was left out."""
    return value.model_dump(exclude_unset=True) if isinstance(value, Strict) else value
