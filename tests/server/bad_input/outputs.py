"""Section 5, rows 69 to 83: constraints, tools and media."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.server.bad_input.case import (
    CHAT,
    COMPLETIONS,
    MAY_PASS,
    RESPONSES,
    USER,
    Case,
    changed,
    named,
    short,
)

_WITH_CONSTRAINTS = (CHAT, COMPLETIONS)
_S = "structured_outputs"
_CONSTRAINTS: list[tuple[int, dict[str, Any], str]] = [
    (74, {}, _S),
    (74, {"regex": ""}, f"{_S}.regex"),
    (74, {"grammar": ""}, f"{_S}.grammar"),
    (74, {"json": ""}, f"{_S}.json"),
    (74, {"choice": []}, f"{_S}.choice"),
    (74, {"choice": [""]}, f"{_S}.choice[0]"),
    (74, {"json_object": False}, f"{_S}.json_object"),
    (74, {"json": {}, "regex": "a"}, _S),
    (74, {"structural_tag": "{}"}, f"{_S}.structural_tag"),
    (75, {"backend": "xgrammar", "regex": "a"}, f"{_S}.backend"),
    (71, {"regex": "a" * 200_000}, f"{_S}.regex"),
    (71, {"grammar": "start: x" + " x" * 70_000 + '\nx: "a"'}, f"{_S}.grammar"),
    (71, {"choice": ["a"] * 10_000}, f"{_S}.choice"),
]
_FORMATS: list[tuple[Any, str]] = [
    ({"type": "xml"}, ""),
    ({}, ""),
    ("json", ""),
    ([], ""),
    ({"type": "json_schema"}, ".json_schema"),
    ({"type": "json_schema", "json_schema": {"name": "", "schema": {}}}, ".json_schema.name"),
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": []}}, ".json_schema.schema"),
    ({"type": "json_schema", "json_schema": {"name": "../a", "schema": {}}}, ".json_schema.name"),
    ({"type": "structural_tag"}, ""),
]
# Which the trial of the grammar finds: a process of its own, which has to start first.
_BAD_SCHEMAS: dict[str, Any] = {
    "type": {"type": "objekt"},
    "pattern": {"type": "string", "pattern": "(a"},
    "lookahead": {"type": "string", "pattern": "(?=a)b"},
    "elsewhere": {"$ref": "http://169.254.169.254/x"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nothing": {"enum": []},
    "itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
}
_BAD_REGEXES = {
    "open group": "(a",
    "open class": "[a-",
    "lookahead": "(?=a)b",
    "lookbehind": "(?<!a)b",
    "backreference": "(a)\\1",
    "nothing": "[^\\x00-\\U0010ffff]",
    "count": "a{2,1}",
}
_BAD_GRAMMARS = {
    "unknown name": "start: /a/ x",
    "no start": 'begin: "a"',
    "itself": "start: start",
    "import": 'start: "a"\n%import ..x (y)',
    "no token": "start: <[4097]>",
}


def function(**fields: Any) -> dict[str, Any]:
    """A tool."""
    return {"type": "function", "function": {"name": "f", **fields}}


_TOOLS: list[Any] = [
    [],
    "f",
    [5],
    [{"type": "function"}],
    [{"type": "custom", "custom": {"name": "f"}}],
    [function(name="")],
    [function(name="a b")],
    [function(name="x" * 65)],
    [function(name=5)],
    [function(), function()],
    [function(name=f"f{i}") for i in range(10_000)],
    [function(parameters="{}")],
    [function(parameters=[])],
    [function(parameters={"type": "array"})],
    [function(parameters={"properties": []})],
    [function(parameters={"required": "a"})],
    [function(strict="yes")],
    [function(unknown=1)],
    [{**function(), "unknown": 1}],
]
_OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
_CHOICES: list[Any] = ["maybe", 5, {}, {"type": "function"}, {**_OTHER, "x": 1}, {"type": "x"},
                       _OTHER]  # fmt: skip
URLS = (
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "http://a\\@b",
    "http://[::ffff:127.0.0.1]/",
    "http://127.0.0.1:1/",
    "http://0x7f000001/",
    "data:image/png;base64,AAAA",
    "data:image/jpeg;base64," + "A" * (1 << 20),
)


def _schema_bodies(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema in every place it may stand."""
    form = {"name": "a", "schema": schema}
    yield CHAT, {"response_format": {"type": "json_schema", "json_schema": form}}
    yield COMPLETIONS, {"response_format": {"type": "json_schema", "json_schema": form}}
    yield COMPLETIONS, {_S: {"json": schema}}
    yield RESPONSES, {"text": {"format": {"type": "json_schema", **form}}}


def _constraints() -> Iterator[Case]:
    for path in _WITH_CONSTRAINTS:
        for row, fields, param in _CONSTRAINTS:
            yield Case(row, named(fields), path, changed(path, **{_S: fields}), param)
        for form, param in _FORMATS:
            body = changed(path, response_format=form)
            yield Case(69, named(form), path, body, f"response_format{param}")
        two = {"response_format": {"type": "json_object"}, _S: {"regex": "a"}}
        yield Case(74, "two kinds", path, changed(path, **two), _S)
        for row, kind, bad in (
            (70, "regex", _BAD_REGEXES),
            (71, "grammar", _BAD_GRAMMARS),
        ):
            for name, text in bad.items():
                body = changed(path, **{_S: {kind: text}})
                yield Case(row, f"{kind}: {name}", path, body, within_s=5.0)
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"not": deep}
    for path, fields in _schema_bodies(deep):
        yield Case(69, "nests", path, changed(path, **fields), "*")
    for name, schema in _BAD_SCHEMAS.items():
        for path, fields in _schema_bodies(schema):
            yield Case(69, name, path, changed(path, **fields), within_s=5.0)
    for form in ({"type": "xml"}, {}, "json", {"type": "json_schema"}):
        body = changed(RESPONSES, text={"format": form})
        yield Case(69, named(form), RESPONSES, body, "text.format*")


def _tools() -> Iterator[Case]:
    for tools in _TOOLS:
        name, forced = f"tools {named(tools)}", {"tools": tools, "tool_choice": "required"}
        yield Case(76, name, CHAT, changed(CHAT, **forced), "*", says="tools")
        if isinstance(tools, list) and all(
            isinstance(t, dict) and t.get("function") for t in tools
        ):
            flat = [{**t, **t["function"]} for t in tools]
            for tool in flat:
                del tool["function"]
            body = short(RESPONSES, **forced | {"tools": flat})
            yield Case(76, name, RESPONSES, body, "*", 400 if tools else MAY_PASS)
    for choice in _CHOICES:
        body = changed(CHAT, tools=[function()], tool_choice=choice)
        yield Case(76, f"choice {named(choice)}", CHAT, body, "*", says="tool_choice")
    yield Case(76, "choice of nothing", CHAT, changed(CHAT, tool_choice="auto"), "*")
    two = changed(CHAT, tools=[function()], tool_choice="required", **{_S: {"regex": "a"}})
    yield Case(74, "tool and regex", CHAT, two, "tool_choice")
    # The model's template knows of no tools.
    body = changed(CHAT, tools=[function()])
    yield Case(76, "auto", CHAT, body, "tools", code="unsupported_parameter")
    none = short(CHAT, tools=[function()], tool_choice="none")
    yield Case(76, "none", CHAT, none, status=200)
    # The model wrote them: a conversation with its mistakes goes on.
    for arguments in ("", "{", "[1]", "NaN", '{"a":' * 500 + "1" + "}" * 500, "\u0000", "[" * 999):
        call: dict[str, Any] = {"name": "f", "arguments": arguments}
        made = [{"id": "x", "type": "function", "function": call}]
        said = {"role": "assistant", "content": "", "tool_calls": made}
        name = f"arguments {named(arguments)}"
        yield Case(76, name, CHAT, short(CHAT, messages=[USER, said]), "*", MAY_PASS)
        item = {"type": "function_call", "call_id": "x", **call}
        yield Case(76, name, RESPONSES, short(RESPONSES, input=[USER, item]), "*", MAY_PASS)


def _media() -> Iterator[Case]:
    """Nothing is fetched or decoded: no kind of media is supported."""
    for row, url in zip((79, 79, 79, 79, 79, 79, 83, 81), URLS, strict=True):
        for detail in ({}, {"detail": "high"}):
            parts = [{"type": "image_url", "image_url": {"url": url, **detail}}]
            body = changed(CHAT, messages=[{**USER, "content": parts}])
            yield Case(row, named(url), CHAT, body, "messages[0].content[0]", says="image_url")
        parts = [{"type": "input_image", "image_url": url}]
        body = changed(RESPONSES, input=[{**USER, "content": parts}])
        yield Case(row, named(url), RESPONSES, body, "input[0].content[0]", says="input_image")
    one = {"type": "image_url", "image_url": {"url": URLS[-2]}}
    text = {"type": "text", "text": "hi"}
    body = changed(CHAT, messages=[{**USER, "content": [text, one, one]}])
    yield Case(84, "two images", CHAT, body, "messages[0].content[1]")
    for row, kind in ((82, "input_audio"), (80, "video_url"), (80, "file"), (63, "image_embeds")):
        part: dict[str, Any] = {"type": kind, kind: {"url": URLS[0], "data": "AAAA"}}
        body = changed(CHAT, messages=[{**USER, "content": [part]}])
        yield Case(row, kind, CHAT, body, "messages[0].content[0]*", says=kind)


CASES = [*_constraints(), *_tools(), *_media()]
