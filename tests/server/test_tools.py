from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from spanwise.embedded import EMBEDDED
from spanwise.errors import InputError
from spanwise.server.tools import deepseek, formats
from spanwise.server.tools.call import Thinking
from spanwise.server.tools.call_id import call_id
from spanwise.server.tools.events import CallArguments, CallEnd, CallStart, Text, ToolEvent
from spanwise.server.tools.formats import FORMATS, tool_format
from spanwise.server.tools.json_reader import MAX_DEPTH, json_kind
from spanwise.server.tools.schema import ALL_TYPES, arguments, closed, json_from_text, json_types
from spanwise.server.tools.tool import (
    MAX_TOOLS,
    Tool,
    ToolChoice,
    read_tool_choice,
    read_tools,
)
from spanwise.server.tools.tool_format import ToolFormat

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "dry": {"type": "boolean"},
            "near": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "days"],
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
)
NOW = Tool("now")
TOOLS = (WEATHER, NOW)
REQUIRED = ToolChoice("required")
BY_NAME = {known.name: known for known in FORMATS}
EVERY_FORMAT = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)

# A call as (name, arguments), a text as itself.
Piece = str | tuple[str, dict[str, Any]]


def joined(events: Iterable[ToolEvent]) -> list[Piece]:
    """What the events say, and that they come in order: texts joined, calls whole."""
    pieces: list[Piece] = []
    open_call: tuple[int, str, str] | None = None
    num_calls = 0
    for event in events:
        match event:
            case Text(text):
                assert text and open_call is None
                if pieces and isinstance(last := pieces[-1], str):
                    pieces[-1] = last + text
                else:
                    pieces.append(text)
            case CallStart(index, _, name):
                assert open_call is None and index == num_calls
                open_call, num_calls = (index, name, ""), num_calls + 1
            case CallArguments(index, fragment):
                assert open_call is not None and index == open_call[0]
                open_call = (index, open_call[1], open_call[2] + fragment)
            case CallEnd(index):
                assert open_call is not None and index == open_call[0]
                assert json_kind(open_call[2]) == "object"
                pieces.append((open_call[1], json.loads(open_call[2])))
                open_call = None
    assert open_call is None
    return pieces


def parse(
    known: ToolFormat, texts: Iterable[str], tools: Sequence[Tool] = TOOLS, **more: Any
) -> list[Piece]:
    parser = known.parser(tools, request_id="r", **more)
    events = [event for text in texts for event in parser.feed(text)]
    return joined(events + parser.finish())


def cut(text: str, borders: Iterable[int]) -> list[str]:
    inner = sorted({border % (len(text) + 1) for border in borders})
    return [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)], strict=True)]


# --- how each format writes calls, as its models' templates do


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def as_objects(calls: Sequence[tuple[str, dict[str, Any]]], key: str) -> list[str]:
    return [f'{{"name": "{name}", "{key}": {dumps(args)}}}' for name, args in calls]


def as_list(opening: str, closing: str) -> Callable[..., str]:
    return lambda *calls: f"{opening}[{', '.join(as_objects(calls, 'arguments'))}]{closing}"


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    blocks = as_objects(calls, "arguments")
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)


def qwen3_coder(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={k}>\n{bare(v)}\n</parameter>\n" for k, v in args.items())
        + "</function>\n</tool_call>"
        for name, args in calls
    )


def glm(line: str) -> Callable[..., str]:
    def write(*calls: tuple[str, dict[str, Any]]) -> str:
        return "\n".join(
            f"<tool_call>{name}{line}"
            + "".join(
                f"<arg_key>{k}</arg_key>{line}<arg_value>{bare(v)}</arg_value>{line}"
                for k, v in args.items()
            )
            + "</tool_call>"
            for name, args in calls
        )

    return write


def mistral(middle: str) -> Callable[..., str]:
    return lambda *calls: "".join(
        f"[TOOL_CALLS]{name}{middle}{dumps(args)}" for name, args in calls
    )


def deepseek_v3(*calls: tuple[str, dict[str, Any]]) -> str:
    inner = "\n".join(
        f"{deepseek.CALL}function{deepseek.SEPARATOR}{name}\n```json\n{dumps(args)}\n```"
        f"{deepseek.CALL_END}"
        for name, args in calls
    )
    return f"{deepseek.SECTION}{inner}{deepseek.SECTION_END}"


def deepseek_v31(*calls: tuple[str, dict[str, Any]]) -> str:
    inner = "".join(
        f"{deepseek.CALL}{name}{deepseek.SEPARATOR}{dumps(args)}{deepseek.CALL_END}"
        for name, args in calls
    )
    return f"{deepseek.SECTION}{inner}{deepseek.SECTION_END}"


def harmony(*calls: tuple[str, dict[str, Any]]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{dumps(args)}<|call|>"
        for name, args in calls
    )


def pythonic(*calls: tuple[str, dict[str, Any]], literal: Callable[[Any], str] = repr) -> str:
    written = (
        f"{name}({', '.join(f'{key}={literal(value)}' for key, value in args.items())})"
        for name, args in calls
    )
    return f"[{', '.join(written)}]"


WRITERS: dict[str, Callable[..., str]] = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "glm": glm("\n"),
    "glm_dense": glm(""),
    "llama_json": lambda *calls: "; ".join(as_objects(calls, "parameters")),
    "mistral_list": as_list("[TOOL_CALLS]", ""),
    "mistral": mistral("[ARGS]"),
    "mistral_with_ids": mistral("[CALL_ID]abcdefghi[ARGS]"),
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "phi4_mini": as_list("<|tool_call|>", "<|/tool_call|>"),
    "functools": as_list("functools", ""),
    "granite": as_list("<|tool_call|>", ""),
    "harmony": harmony,
    "pythonic": pythonic,
}
# A list of Python calls, or a bare object, is a call only where an answer begins with it.
ONLY_AT_START = {"llama_json", "pythonic"}


# --- the same events however the text is cut


@dataclass(frozen=True)
class Sample:
    """An answer in one format, and what it holds."""

    known: str
    text: str
    pieces: list[Piece]


NESTED: dict[str, Any] = {
    "city": 'Zürich "x" \\ 日本\n\t🌍 </tool_call>',
    "days": -2,
    "tags": ["a", "<b>", "}"],
    "dry": True,
    "near": {"x": 1.5, "y": {"z": [None, {}]}},
}
FIRST = ("get_weather", NESTED)
SECOND = ("now", {})


def samples(name: str, write: Callable[..., str]) -> list[Sample]:
    found = [
        Sample(name, write(SECOND), [SECOND]),
        Sample(name, write(FIRST, SECOND), [FIRST, SECOND]),
        Sample(name, f"\n{write(FIRST)}\n", [FIRST]),
        Sample(name, f"{write(FIRST)}\nDone <b>.", [FIRST, "\nDone <b>."]),
    ]
    if name not in ONLY_AT_START:
        text = f"One moment.\n{write(FIRST)} and {write(SECOND)} then"
        found.append(Sample(name, text, ["One moment.\n", FIRST, " and ", SECOND, " then"]))
    return found


FORMS = [
    Sample("hermes", '<tool_call>{"arguments":{},"name":"now"}</tool_call>', [SECOND]),
    Sample("hermes", '<tool_call>{"name": "now", "arguments": {}}', [SECOND]),
    Sample("hermes", '<tool_call>{"name": "now", "arguments": {}}\n</tool', [SECOND]),
    Sample("hermes", '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>', [SECOND]),
    Sample(
        "hermes",
        '<tool_call>oh</tool_call><tool_call>{"name":"now","arguments":{}}</tool_call>',
        ["<tool_call>oh</tool_call>", SECOND],
    ),
    Sample("llama_json", '<|python_tag|>{"name": "now", "parameters": {}}', [SECOND]),
    Sample("llama_json", '{"type": "function", "name": "now", "parameters": {}} ;', [SECOND, " ;"]),
    Sample(
        "mistral_list",
        '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "123456789"}]',
        [SECOND],
    ),
    Sample("mistral_list", '[TOOL_CALLS][{"name": "now", "arguments": {}}', [SECOND]),
    Sample("mistral", "[TOOL_CALLS]now{}", [SECOND]),
    Sample("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', [SECOND]),
    Sample("phi4_mini", '<|tool_call|>{"name": "now", "arguments": {}}<|/tool_call|>', [SECOND]),
    Sample("granite", '<tool_call>[{"name": "now", "arguments": {}}]', [SECOND]),
    Sample("functools", "functools.cache", ["functools.cache"]),
    Sample("qwen3_coder", "<function=now>\n</function>\n</tool_call>", [SECOND]),
    Sample("qwen3_coder", "<tool_call><function=now></function>", [SECOND]),
    Sample("harmony", " to=functions.now<|channel|>commentary json<|message|>{}", [SECOND]),
    Sample("harmony", "<|channel|>final<|message|>Hi", ["<|channel|>final<|message|>Hi"]),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>to=<|channel|>commentary to=functions.now<|message|>{}"
        "<|end|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        [
            "<|channel|>analysis<|message|>to=<|channel|>commentary to=functions.now<|message|>{}"
            "<|end|>",
            SECOND,
        ],
    ),
    Sample("pythonic", "<|python_start|>[now( )]<|python_end|>", [SECOND]),
    Sample(
        "pythonic",
        r"""[get_weather(city="a\x41é\n\'\101\d", days=+1)]""",
        [r"""[get_weather(city="a\x41é\n\'\101\d", days=+1)]"""],
    ),
    Sample(
        "pythonic",
        r"""[get_weather(city="a\x41\u00e9\n\'\101\d\ud83d\ude00", near={'x': null})]""",
        [("get_weather", {"city": "aAé\n'A\\d😀", "near": {"x": None}})],
    ),
]
SAMPLES = [sample for name, write in WRITERS.items() for sample in samples(name, write)] + FORMS


def test_every_format_is_sampled() -> None:
    assert WRITERS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.known)
def test_an_answer_reads_the_same_however_it_is_cut(sample: Sample) -> None:
    known, text = BY_NAME[sample.known], sample.text
    assert parse(known, [text]) == sample.pieces
    assert parse(known, text) == sample.pieces
    for border in range(1, len(text)):
        assert parse(known, [text[:border], text[border:]]) == sample.pieces


@given(st.sampled_from(SAMPLES), st.lists(st.integers(0, 10_000), max_size=12))
def test_an_answer_reads_the_same_in_any_pieces(sample: Sample, borders: list[int]) -> None:
    assert parse(BY_NAME[sample.known], cut(sample.text, borders)) == sample.pieces


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    parser = formats.HERMES.parser(TOOLS)
    assert parser.feed("see <tool") == [Text("see ")]
    assert parser.feed("box>") == [Text("<toolbox>")]
    assert parser.feed('<tool_call>\n{"name": "now') == []
    assert parser.feed('here"') == [Text('<tool_call>\n{"name": "nowhere"')]
    # An object as the whole answer is no call as soon as its first member is none of a call's.
    parser = formats.LLAMA_JSON.parser(TOOLS)
    assert parser.feed('{"name') == []
    assert parser.feed('s": [') == [Text('{"names": [')]


# --- whatever is no call comes out as it went in

FRAGMENTS = sorted(
    {
        *("__import__('os')", "hello ", " ", "\n", "é", "🌍", '"', "\\", "<", "[", "{", "}", "]"),
        *("(", ")", "=", ",", ";", ":", "now", "get_weather", "nowhere", "functions.now", "\ufffd"),
        *('{"name": "now", "arguments": {}}', '"parameters": {}', "city='a'", "now()", "function"),
        *("<function=now>", "<parameter=city>", "</function>", "<think>", "</think>", "json"),
        *("\n```json\n", "functools", "commentary", "analysis", " to=functions.now", "assistant"),
        *(mark for known in FORMATS for mark in (*known.marks, *known.openings)),
    }
)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.booleans(),
)
def test_no_text_is_lost_doubled_or_refused(
    known: ToolFormat, fragments: list[str], borders: list[int], thinking: bool
) -> None:
    text = "".join(fragments)
    whole = parse(known, [text], thinking=thinking)
    assert parse(known, text, thinking=thinking) == whole
    assert parse(known, cut(text, borders), thinking=thinking) == whole
    if all(isinstance(piece, str) for piece in whole):
        assert "".join(map(str, whole)) == text
    else:
        rest = text
        for piece in whole:
            said = piece if isinstance(piece, str) else piece[0]
            assert said in rest
            rest = rest[rest.index(said) + len(said) :]


def malformed(call: str) -> list[str]:
    """Texts that are nearly the call, which holds `now`."""
    return [
        call.replace("now", "nowhere"),
        call.replace("now", ""),
        call.replace("now", "now evil"),
        call.replace("{}", '{"a": 01}'),
        call.replace("{}", '{"a": }'),
        call.replace("{}", '{"a": "\n"}'),
        call.replace("{}", '{"a": NaN}'),
        call.replace("{}", '{"a": "\\x"}'),
        call.replace("{}", "{'a': 1}"),
        call.replace("{}", '{"a"}'),
        call.replace("{}", "[]"),
        call.replace("{}", '"{}"'),
        call.replace("{}", "{" + '"a":{' * MAX_DEPTH + "}" * MAX_DEPTH + "}"),
        call.replace("()", "(__import__('os'))"),
        call.replace("()", "(a=__import__('os'))"),
        call.replace("()", "(a=b)"),
        call.replace("()", "(a=1, a=2)"),
        call.replace("()", "(1)"),
        call.replace("()", "(a='b'"),
        call.replace("()", "(a={1: 2})"),
        call.replace("()", "(a=" + "[" * 99 + "]" * 99 + ")"),
        call.replace("()", "(a='\\N{DASH}')"),
        call.replace("()", "(a='\\U00110000')"),
        call.replace("()", "(a=" + "-" * 99_999 + "1)"),
        call.replace("\n</function>", "\n<parameter=city>x</function>"),
        call.replace("now\n</", "now\n<arg_key>city</"),
    ]


@EVERY_FORMAT
def test_a_malformed_call_is_text(known: ToolFormat) -> None:
    call = WRITERS[known.name](SECOND)
    different = [text for text in malformed(call) if text != call]
    assert len(different) >= 3
    for text in [*different, "__import__('os')", f"{known.openings[0]}__import__('os')"]:
        assert parse(known, [text]) == [text], text
        assert parse(known, cut(text, range(0, len(text), 7))) == [text], text


@EVERY_FORMAT
def test_half_a_call_is_text_when_the_answer_ends(known: ToolFormat) -> None:
    call = WRITERS[known.name](FIRST)
    end = max(call.rfind("null"), call.rfind("None")) + 4
    for length in range(1, end):
        assert parse(known, [call[:length]]) == [call[:length]]


def test_a_call_of_a_list_is_kept_when_the_next_one_breaks() -> None:
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "argu'
    assert parse(formats.MISTRAL_LIST, [text]) == [SECOND, ', {"name": "now", "argu']


def test_white_space_alone_is_text() -> None:
    assert parse(formats.HERMES, ["\n", " \n"]) == ["\n \n"]
    assert parse(formats.HERMES, ["\n", " x"]) == ["\n x"]


def test_long_arguments_are_read_in_one_pass() -> None:
    # Read anew at every piece, this would take hours.
    city = "word \\n é" * 30_000
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "' + city + '"}}</tool_call>'
    [piece] = parse(formats.HERMES, cut(call, range(0, len(call), 5)))
    assert piece == ("get_weather", {"city": city.replace("\\n", "\n")})


# --- arguments

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


# --- ids, parallel calls, thinking


def ids(known: ToolFormat, request_id: str) -> list[str]:
    parser = known.parser(TOOLS, request_id=request_id)
    events = parser.feed(WRITERS[known.name](FIRST, SECOND)) + parser.finish()
    return [event.id for event in events if isinstance(event, CallStart)]


@EVERY_FORMAT
def test_ids_are_the_same_when_an_answer_is_replayed(known: ToolFormat) -> None:
    assert ids(known, "req-1") == ids(known, "req-1")
    assert len({*ids(known, "req-1"), *ids(known, "req-2")}) == 4
    shape = r"[a-zA-Z0-9]{9}" if known.name.startswith("mistral") else r"call_[a-zA-Z0-9]{24}"
    assert all(re.fullmatch(shape, one) for one in ids(known, "req-1"))


def test_ids_do_not_collide() -> None:
    assert (
        len({call_id(str(request), index) for request in range(99) for index in range(99)}) == 9801
    )


@EVERY_FORMAT
def test_without_parallel_calls_the_answer_ends_with_its_first(known: ToolFormat) -> None:
    text = f"{WRITERS[known.name](FIRST, SECOND)} more"
    for texts in ([text], list(text)):
        assert parse(known, texts, parallel=False) == [FIRST]
    parser = known.parser(TOOLS, parallel=False)
    parser.feed(text)
    assert parser.done and parser.num_calls == 1
    assert parser.feed("more") == parser.finish() == []


THINKING_HERMES = tool_format(
    "{% if tools %}<tool_call>{name, arguments}</tool_call>{% endif %}<think></think>"
)


def test_what_is_thought_is_no_call() -> None:
    assert THINKING_HERMES is not None and THINKING_HERMES.thinking == Thinking()
    call = hermes(SECOND)
    for text, pieces in {
        f"<think>{call}</think>\n{call}": [f"<think>{call}</think>", SECOND],
        f"\n<think>{call}": [f"\n<think>{call}"],
        f"so <think>{call}": ["so <think>", SECOND],
        "<think>x</think>\n": ["<think>x</think>\n"],
        "<think>x</think>\n\nHi": ["<think>x</think>\n\nHi"],
    }.items():
        assert parse(THINKING_HERMES, [text]) == parse(THINKING_HERMES, text) == pieces
    opened = f"{call}</thi</think>{call}"
    for texts in ([opened], list(opened)):
        assert parse(THINKING_HERMES, texts, thinking=True) == [f"{call}</thi</think>", SECOND]


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("", False)],
)
def test_an_answer_may_begin_within_thinking(prompt: str, thinking: bool) -> None:
    assert THINKING_HERMES is not None
    assert THINKING_HERMES.is_thinking(f"assistant\n{prompt}") == thinking
    assert not formats.HERMES.is_thinking(f"assistant\n{prompt}")


def test_how_a_model_thinks_is_told_from_its_template() -> None:
    known = tool_format(TEMPLATES["mistral"] + "[THINK]{{ thoughts }}[/THINK]")
    assert known is not None and known.thinking == Thinking("[THINK]", "[/THINK]")
    text = "[THINK]" + mistral("[ARGS]")(SECOND) + "[/THINK]"
    assert parse(known, text + mistral("[ARGS]")(SECOND)) == [text, SECOND]
    assert formats.HARMONY.thinking == getattr(tool_format(TEMPLATES["harmony"]), "thinking", None)


# --- recognising

QUOTED = '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}'
FOR_TOOLS = "{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}"
TEMPLATES = {
    "hermes": f'{FOR_TOOLS}{{{{- "within <tool_call>\\n{QUOTED}\\n</tool_call>" }}}}',
    "qwen3_coder": f"{FOR_TOOLS}{{{{ '<tool_call>\\n<function=' + name + '>\\n<parameter=' }}}}"
    "</tool_call> arguments",
    "glm": f"{FOR_TOOLS}<tool_call>{{n}}\n<arg_key>{{k}}</arg_key>\n<arg_value>{{v}}</arg_value>\n"
    "</tool_call> arguments",
    "glm_dense": f"{FOR_TOOLS}<tool_call>{{n}}<arg_key>{{k}}</arg_key><arg_value>{{v}}</arg_value>"
    "</tool_call> arguments",
    "llama_json": f"{FOR_TOOLS}"
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary' }}""",
    "mistral_list": f'{FOR_TOOLS}{{{{- "[TOOL_CALLS] [" }}}}',
    "mistral": f'{FOR_TOOLS}{{{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}}}',
    "mistral_with_ids": f"{FOR_TOOLS}{{{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]'}}}}",
    "deepseek_v3": f"{FOR_TOOLS}{deepseek.SECTION}{deepseek.SEPARATOR}```json",
    "deepseek_v31": f"{FOR_TOOLS}{deepseek.SECTION}{deepseek.SEPARATOR}",
    "phi4_mini": f"{FOR_TOOLS}{{{{- '<|tool_call|>' + (call | tojson) + '<|/tool_call|>' -}}}}",
    "functools": f'{FOR_TOOLS}formatted as functools[{{"name": [function name]',
    "granite": f"{FOR_TOOLS}<|start_of_role|> respond only with <|tool_call|> followed by a list",
    "harmony": f"{FOR_TOOLS}<|channel|>commentary to=functions.f<|message|>{{{{ f }}}}<|call|>",
    "pythonic": f"{FOR_TOOLS}Respond in the format [func_name1(params_name1=params_value1)]",
}


def test_a_template_of_every_format_is_known() -> None:
    assert {name: getattr(tool_format(text), "name", None) for name, text in TEMPLATES.items()} == {
        name: name for name in BY_NAME
    }


def test_a_template_that_shows_no_tools_has_no_format() -> None:
    for text in TEMPLATES.values():
        assert (
            tool_format(text.replace(FOR_TOOLS, "{{ '# tools' }} tools {{ message.tools }}"))
            is None
        )


@pytest.mark.parametrize("model", sorted(EMBEDDED))
def test_the_embedded_models_call_no_tools(model: str) -> None:
    assert tool_format((EMBEDDED[model] / "chat_template.jinja").read_text()) is None


@pytest.mark.parametrize("text", ["", FOR_TOOLS, f"{FOR_TOOLS}<tool_calls>", "{% if tools"])
def test_an_unknown_template_has_no_format(text: str) -> None:
    assert tool_format(text) is None


# --- grammars

EOS = (2, 4)


@cache
def tokenizer(marks: tuple[str, ...]) -> tuple[Tokenizer, LLTokenizer, dict[str, int]]:
    """The embedded tokenizer, with the marks as tokens of their own."""
    folder = Path(next(iter(EMBEDDED.values())))
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.add_special_tokens([AddedToken(mark, special=True) for mark in marks[::2]])
    found.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks[1::2]])
    added = {token.content: i for i, token in found.get_added_tokens_decoder().items()}
    return found, LLTokenizer(found.to_str(), eos_token=list(EOS)), added


@dataclass(frozen=True)
class Forced:
    """A grammar with a tokenizer to try it on."""

    encoder: Tokenizer
    tokens: LLTokenizer
    grammar: str

    def accepts(self, text: str) -> bool:
        """Whether a whole answer may be this."""
        matcher = LLMatcher(self.tokens, self.grammar)
        ids = self.encoder.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def walk(self, seed: int, max_tokens: int = 120) -> str | None:
        """A random answer, None for one that found no end."""
        matcher, drawn, weights = (
            LLMatcher(self.tokens, self.grammar),
            random.Random(seed),
            _weights(),
        )
        ids: list[int] = []
        while len(ids) < max_tokens:
            allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias]
            assert allowed, matcher.get_error()
            # The marks come after the vocabulary that has weights.
            [token] = drawn.choices(allowed, [weights.get(i, HEAVY) for i in allowed])
            assert matcher.consume_token(token)
            if token not in EOS:
                ids.append(token)
            if matcher.is_stopped():
                text: str = self.encoder.decode(ids, skip_special_tokens=False)
                return text
        return None


HEAVY = 300


@cache
def _weights() -> dict[int, int]:
    """How likely a walk takes a token: strings and lists have to come to an end."""
    encoder, _, _ = tokenizer(())
    texts = {i: encoder.decode([i]) for i in range(encoder.get_vocab_size()) if i not in EOS}
    return {
        i: HEAVY if text[:1] == "<" else 100 if text and set(text) <= set('"}], ') else 1
        for i, text in texts.items()
    }


def forced(
    known: ToolFormat,
    choice: ToolChoice = REQUIRED,
    parallel: bool = True,
    *,
    tools: Sequence[Tool] = TOOLS,
    own_tokens: bool = False,
    thinking: bool = False,
) -> Forced:
    marks = known.marks
    if own_tokens and known.thinking == Thinking():
        marks = (*marks, "<think>", "</think>")
    encoder, tokens, added = tokenizer(marks if own_tokens else ())
    grammar = known.grammar(tools, choice, parallel, added_tokens=added, thinking=thinking)
    assert grammar.kind == "lark"
    compiled = LLMatcher.grammar_from_lark(grammar.text)
    assert LLMatcher.validate_grammar(compiled, tokens) == ""
    return Forced(encoder, tokens, compiled)


OWN_TOKENS = pytest.mark.parametrize("own_tokens", [False, True], ids=["text", "tokens"])
# What a model is held to write: JSON's strings are Python's too.
FORCED_WRITERS = {**WRITERS, "pythonic": partial(pythonic, literal=dumps)}
TYPICAL = ("get_weather", {"city": "Zürich\n5", "days": 2, "unit": "F", "near": {"x": 1.5}})
ONE_CALL = {"llama_json", "harmony"}


@EVERY_FORMAT
@OWN_TOKENS
def test_a_forced_call_is_one_that_models_write(known: ToolFormat, own_tokens: bool) -> None:
    write = FORCED_WRITERS[known.name]
    both = forced(known, own_tokens=own_tokens)
    assert both.accepts(write(TYPICAL)) and both.accepts(write(SECOND))
    assert both.accepts(write(TYPICAL, SECOND)) == (known.name not in ONE_CALL)
    for wrong in (
        "Hello",
        "",
        f"Hello {write(SECOND)}",
        write(("nowhere", {})),
        write(("now", {"a": "b"})),
        write(("get_weather", {"days": 2})),
        write(("get_weather", {"city": "a", "days": "two"})),
        write(("get_weather", {"city": "a", "days": 2, "unit": "K"})),
    ):
        assert not both.accepts(wrong), wrong


@EVERY_FORMAT
@OWN_TOKENS
def test_a_named_function_is_called_once(known: ToolFormat, own_tokens: bool) -> None:
    write = FORCED_WRITERS[known.name]
    named = forced(known, ToolChoice("named", "now"), own_tokens=own_tokens)
    assert named.accepts(write(SECOND))
    assert not named.accepts(write(TYPICAL))
    assert not named.accepts(write(SECOND, SECOND))


@EVERY_FORMAT
def test_without_parallel_calls_one_is_forced(known: ToolFormat) -> None:
    write = WRITERS[known.name]
    single = forced(known, parallel=False)
    assert single.accepts(write(SECOND))
    assert not single.accepts(write(SECOND, SECOND))


@EVERY_FORMAT
@OWN_TOKENS
def test_whatever_is_forced_is_read_back(known: ToolFormat, own_tokens: bool) -> None:
    both = forced(known, own_tokens=own_tokens)
    texts = [text for seed in range(6) if (text := both.walk(seed)) is not None]
    assert texts
    for text in texts:
        pieces = parse(known, [text])
        thought = [piece for piece in pieces if isinstance(piece, str)]
        assert len(pieces) > len(thought)
        # Only harmony may think first here, and thoughts are text.
        assert all(piece.startswith("<|channel|>analysis") for piece in thought), text


@OWN_TOKENS
def test_a_model_may_think_before_it_must_call(own_tokens: bool) -> None:
    known = THINKING_HERMES
    assert known is not None
    call, free = hermes(SECOND), forced(known, own_tokens=own_tokens)
    assert free.accepts(call) and free.accepts(f"<think>\nhm\n</think>\n\n{call}")
    assert not free.accepts(f"hm</think>{call}")
    opened = forced(known, own_tokens=own_tokens, thinking=True)
    assert opened.accepts(f"hm\n</think>\n\n{call}")
    assert not opened.accepts(call)


STRANGE = {"type": "object", "properties": {"a": {"type": "string", "format": "postcode"}}}


def test_what_cannot_be_enforced_is_refused_only_where_it_must_be() -> None:
    forced(formats.HERMES, tools=[Tool("f", STRANGE)])
    _, tokens, added = tokenizer(())
    strict = formats.HERMES.grammar([Tool("f", STRANGE, strict=True)], REQUIRED, added_tokens=added)
    assert "postcode" in LLMatcher.validate_grammar(
        LLMatcher.grammar_from_lark(strict.text), tokens
    )


@EVERY_FORMAT
def test_as_many_tools_as_there_may_be_can_be_forced(known: ToolFormat) -> None:
    tools = [Tool(f"tool_{i}", WEATHER.parameters) for i in range(MAX_TOOLS)]
    many = forced(known, tools=tools, parallel=False)
    assert many.accepts(FORCED_WRITERS[known.name](("tool_127", TYPICAL[1])))


@EVERY_FORMAT
def test_names_and_values_of_any_spelling_can_be_forced(known: ToolFormat) -> None:
    schema = {
        "type": "object",
        "properties": {'é-"key': {"enum": ['a "b" \\ \n☃', "</x>", 5, None]}, "b": True},
        "required": ['é-"key'],
        "x-guidance": {"whitespace_flexible": True},
    }
    tool = Tool("a-b", schema)
    for value in ('a "b" \\ \n☃', "</x>", 5, None):
        call = ("a-b", {'é-"key': value})
        text = FORCED_WRITERS[known.name](call)
        assert forced(known, tools=[tool]).accepts(text)
        if known.name != "pythonic":  # a quote is in no keyword
            assert parse(known, [text], [tool]) == [call]


# --- a request's tools


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
