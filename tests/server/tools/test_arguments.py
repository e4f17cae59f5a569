"""What the arguments of a call become, by the function's schema."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.tools.writers import TOOLS, WRITERS, cut, parse

from spanwise.server.tools import formats
from spanwise.server.tools.events import CallArguments
from spanwise.server.tools.formats import FORMATS
from spanwise.server.tools.schema import ALL_TYPES, arguments, closed, json_from_text, json_types
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KINDS = {
    **{type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"},
    **{list: "array", dict: "object"},
}


@given(st.sampled_from(FORMATS), st.dictionaries(KEYS, VALUES, max_size=4), st.data())
def test_any_arguments_come_through(
    known: ToolFormat, args: dict[str, Any], data: st.DataObject
) -> None:
    properties = {key: {"type": KINDS[type(value)]} for key, value in args.items()}
    tool = Tool("get_weather", {"type": "object", "properties": properties})
    text = WRITERS[known.name](("get_weather", args))
    borders = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert parse(known, cut(text, borders), [tool]) == [("get_weather", args)]


def test_json_arguments_stay_as_they_were_written() -> None:
    args = '{ "a" : 1E400,"b":"\\ud800 \\/","c":100000000000000000000.10 , "a":[ ]}'
    parser = formats.HERMES.parser(TOOLS)
    events = parser.feed(f'<tool_call>{{"name":"now","arguments":{args}}}</tool_call>')
    assert CallArguments(0, args) in events


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": "string"}, '"5"'),
        ("5", {"type": "integer"}, "5"),
        ("5.0", {"type": "integer"}, "5.0"),
        ("5", {"type": "number"}, "5"),
        (" 5\n", {"type": "number"}, "5"),
        ("five", {"type": "integer"}, '"five"'),
        ("5", {"type": ["string", "integer"]}, '"5"'),
        ("null", {"type": ["string", "null"]}, "null"),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "null"),
        ("null", {"type": "string"}, '"null"'),
        ("True", {"type": "boolean"}, "true"),
        ("false", {"type": "boolean"}, "false"),
        ('{"a": [1]}', {"type": "object"}, '{"a": [1]}'),
        ('{"a": [1]}', {"type": "string"}, '"{\\"a\\": [1]}"'),
        ("[1, 2", {"type": "array"}, '"[1, 2"'),
        ('"x"', {"type": "string"}, '"\\"x\\""'),
        ("2", {"enum": [1, 2]}, "2"),
        ("2", {"enum": ["1", "2"]}, '"2"'),
        ("2", {"const": 2}, "2"),
        ("2", {"$ref": "#/$defs/id"}, '"2"'),
        ("2", {"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, "2"),
        ("2", {}, "2"),
        ("two", {}, '"two"'),
        ("NaN", {}, '"NaN"'),
        ("é\n", {}, '"é\\n"'),
        ("", {"type": "integer"}, '""'),
    ],
)
def test_bare_text_becomes_what_the_schema_says(
    text: str, schema: dict[str, Any], expected: str
) -> None:
    root = {"$defs": {"id": {"type": "string"}}}
    assert json_from_text(text, json_types(schema, root)) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/none"},
        {"$ref": "http://x/y"},
        {"$ref": 5},
        {"type": 5},
        {"type": [{}]},
        {"enum": 5, "allOf": 5, "anyOf": {}, "oneOf": "x"},
        True,
        5,
        None,
    ],
)
def test_a_schema_that_says_nothing_allows_everything(schema: object) -> None:
    root = schema if isinstance(schema, dict) else {}
    types = json_types(schema, root)
    assert types in (ALL_TYPES, frozenset())
    assert arguments(root) == {}


def test_a_schema_of_many_references_is_read_quickly() -> None:
    definitions = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9, "required": [f"a{i}"]}
        for i in range(40)
    }
    root = {"$defs": definitions, "$ref": "#/$defs/d0"}
    assert json_types(root, root) == ALL_TYPES
    assert {"a0", "a9"} <= arguments(root).keys()


def test_arguments_are_found_through_references() -> None:
    root = {
        "$defs": {"base": {"properties": {"a": {"type": "string"}}, "required": ["a"]}},
        "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": True}}],
        "required": ["c"],
    }
    assert arguments(root) == {
        "a": ({"type": "string"}, True),
        "b": (True, False),
        "c": (True, True),
    }


@pytest.mark.parametrize(
    ("parameters", "is_closed"),
    [
        ({}, True),
        ({"properties": {}}, True),
        ({"properties": {"a": {}}, "required": ["a"]}, True),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {}, "additionalProperties": True}, False),
        ({"properties": {}, "allOf": []}, False),
        ({"type": "object"}, False),
    ],
)
def test_only_listed_arguments_are_allowed(parameters: dict[str, Any], is_closed: bool) -> None:
    assert (closed(parameters).get("additionalProperties") is False) == is_closed
