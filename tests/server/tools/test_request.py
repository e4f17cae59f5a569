"""The tools and the choice of a request, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.server.tools.writers import REQUIRED, TOOLS

from spanwise.errors import InputError
from spanwise.server.tools.tool import MAX_TOOLS, Tool, ToolChoice, read_tool_choice, read_tools


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_tools_are_read() -> None:
    schema = {"type": "object", "properties": {"a": True}, "required": ["a"], "$defs": {}}
    assert read_tools(None) == ()
    assert read_tools([function(), function(name="g-_9", parameters=schema, strict=True)]) == (
        Tool("f"),
        Tool("g-_9", schema, None, True),
    )
    [tool] = read_tools([function(description="d", parameters=None, strict=None)])
    assert tool == Tool("f", {}, "d")
    assert len(read_tools([function(name=f"f{i}") for i in range(MAX_TOOLS)])) == MAX_TOOLS


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "tools must be a list"),
        ({}, "tools must be a list"),
        ("now", "tools must be a list"),
        ([function(name=f"f{i}") for i in range(10_000)], "128 at most"),
        ([function(), 5], r"tools\[1\] must be an object"),
        ([{"function": {"name": "f"}}], r'tools\[0\].type must be "function"'),
        ([{"type": "custom", "custom": {}}], r"tools\[0\].custom is not known"),
        ([{"type": "function"}], r"tools\[0\].function must be an object"),
        ([{**function(), "x": 1}], r"tools\[0\].x is not known"),
        ([function(x=1)], r"tools\[0\].function.x is not known"),
        ([function(name="")], "name must be 1 to 64"),
        ([function(name=None)], "name must be 1 to 64"),
        ([function(name="a b")], "name must be 1 to 64"),
        ([function(name="é")], "name must be 1 to 64"),
        ([function(name="f\n")], "name must be 1 to 64"),
        ([function(name="x" * 65)], "name must be 1 to 64"),
        ([function(), function()], r"tools\[1\].function.name 'f' is that of tools\[0\]"),
        ([function(description=5)], "description must be a string"),
        ([function(strict="yes")], "strict must be true or false"),
        ([function(parameters="{}")], "parameters must be a JSON schema"),
        ([function(parameters=[])], "parameters must be a JSON schema"),
        ([function(parameters={"type": "string"})], 'parameters.type must be "object"'),
        ([function(parameters={"type": ["object"]})], 'parameters.type must be "object"'),
        ([function(parameters={"properties": []})], "properties must be an object"),
        ([function(parameters={"properties": {"a": "string"}})], "must be a schema"),
        ([function(parameters={"required": "a"})], "required must be a list of strings"),
        ([function(parameters={"required": [1]})], "required must be a list of strings"),
        ([function(parameters={"properties": {"\ud800": {}}})], "half a surrogate pair"),
        ([function(description="\ud800")], "half a surrogate pair"),
        ([function(parameters={"properties": {"a": DEEP}})], "nests deeper than 32"),
    ],
)
def test_wrong_tools_are_refused_in_one_line(value: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_tools(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_tool_choice_is_read() -> None:
    named = {"type": "function", "function": {"name": "now"}}
    assert read_tool_choice(None, ()) == read_tool_choice("none", ()) == ToolChoice("none")
    assert read_tool_choice(None, TOOLS) == read_tool_choice("auto", TOOLS) == ToolChoice("auto")
    assert read_tool_choice("none", TOOLS) == ToolChoice("none")
    assert read_tool_choice("required", TOOLS) == REQUIRED
    assert read_tool_choice(named, TOOLS) == ToolChoice("named", "now")


@pytest.mark.parametrize(
    ("value", "tools", "said"),
    [
        ("auto", (), "needs tools"),
        ("always", TOOLS, "must be"),
        (5, TOOLS, "must be"),
        ([], TOOLS, "must be"),
        ({"type": "function"}, TOOLS, "must be"),
        ({"type": "function", "function": {"name": 5}}, TOOLS, "must be"),
        ({"type": "function", "function": {"name": "now", "x": 1}}, TOOLS, "must be"),
        ({"type": "function", "function": {"name": "now"}, "x": 1}, TOOLS, "must be"),
        ({"type": "allowed_tools", "allowed_tools": {}}, TOOLS, "must be"),
        ({"type": "function", "function": {"name": "nowhere"}}, TOOLS, "not among tools"),
    ],
)
def test_a_wrong_tool_choice_is_refused(value: object, tools: Sequence[Tool], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_tool_choice(value, tools)
