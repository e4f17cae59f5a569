"""What all requests have in common: every field is known, and every value is in its range.

A field that is null is as if it were left out. A field that no API of this kind has is refused, one
of another's that would change the answer too; ``Unsupported`` marks those that are known by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from spanwise.server.limits import (
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_INT32,
    MAX_METADATA,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    MAX_NAME_CHARACTERS,
)

NOT_NULL: JsonSchemaValue = {"not": {"type": "null"}}


class Strict(BaseModel):
    """A record of a request. Nothing is converted, nothing unknown passes."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        # Each unknown one would be an error of its own.
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "Object has too many fields")
        return data


class Unsupported:
    """Marks a field that other servers have, and that only may say what is so anyway."""

    def __init__(self, *neutral: object, advice: str = "leave it out") -> None:
        self._neutral, self._advice = neutral, advice

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Take the neutral values only."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Say so in the API's document."""
        return {"enum": [None, *self._neutral], "description": "Not supported."}

    def _check(self, value: object) -> object:
        if value is None or any(type(value) is type(n) and value == n for n in self._neutral):
            return value
        raise PydanticCustomError(
            "unsupported", "is not supported; {advice}", {"advice": self._advice}
        )


def given(**fields: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON schema of objects that have these fields."""
    return {"required": [*fields], "properties": fields}


def only_one(*names: str) -> JsonSchemaValue:
    """The JSON schema of objects that have one of these fields; one that is null is left out."""
    others: JsonSchemaValue = {name: {"type": "null"} for name in names}
    return {
        "anyOf": [{"required": [name], "properties": {**others, name: NOT_NULL}} for name in names]
    }


def is_deep(value: Any) -> bool:
    """Whether JSON nests deeper than 64 levels; whatever walks it by recursion takes less."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _check_depth(value: Any) -> Any:
    if is_deep(value):
        raise PydanticCustomError("too_deep", f"nests deeper than {MAX_DEPTH} levels")
    return value


def _few_pairs(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise PydanticCustomError("too_long", f"Object should have at most {MAX_METADATA} fields")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_depth)]
"""JSON that is passed on as it is, no deeper than 64 levels."""

Name = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARACTERS)]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=MAX_METADATA_KEY)],
        Annotated[str, StringConstraints(max_length=MAX_METADATA_VALUE)],
    ],
    BeforeValidator(_few_pairs),
    Field(max_length=MAX_METADATA),
]
Count = Annotated[int, Field(ge=1, le=MAX_INT32)]
Natural = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
