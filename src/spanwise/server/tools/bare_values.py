"""Arguments that stand as bare text between tags: their JSON by the schema, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.schema import (
    Schema,
    arguments,
    json_from_text,
    json_types,
    object_json,
    standalone,
)
from spanwise.server.tools.tool import Tool


def json_arguments(values: Mapping[str, str], tool: Tool) -> str:
    """The JSON object of arguments written as bare text."""
    known = arguments(tool.parameters)
    other = tool.parameters.get("additionalProperties", True)
    return object_json(
        {
            key: _json(text, known[key][0] if key in known else other, tool)
            for key, text in values.items()
        }
    )


def write_value(grammar: LarkGrammar, schema: Schema, tool: Tool, after: str, text_end: str) -> str:
    """One value and what ends it: ``after``, or after free text the mark ``text_end`` alone."""
    if options := _options(schema):
        return grammar.one_of(
            f"{grammar.literal(text)} {grammar.literal(after)}" for text in options
        )
    if "string" in json_types(schema, tool.parameters):
        return grammar.until(text_end)
    value = grammar.json(standalone(schema, tool.parameters), strict=tool.strict)
    return f"{value} {grammar.literal(after)}"


def _json(text: str, schema: object, tool: Tool) -> str:
    options = _options(schema)
    if text in options:
        return json.dumps(options[text], ensure_ascii=False)
    return json_from_text(text, json_types(schema, tool.parameters))


def _options(schema: object) -> dict[str, Any]:
    """Each of the values the schema lists, by the text it is written as."""
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if not isinstance(values, list):
        return {}
    return {value if isinstance(value, str) else json.dumps(value): value for value in values}
