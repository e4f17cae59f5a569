"""Calls are found in an answer however it is cut, and whatever is none comes out as it went in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.tools.writers import (
    BY_NAME,
    EVERY_FORMAT,
    FIRST,
    ONLY_AT_START,
    SECOND,
    TOOLS,
    WRITERS,
    Piece,
    cut,
    parse,
)

from spanwise.server.tools import formats
from spanwise.server.tools.events import Text
from spanwise.server.tools.formats import FORMATS
from spanwise.server.tools.json_reader import MAX_DEPTH
from spanwise.server.tools.tool_format import ToolFormat

# --- the same events however the text is cut


@dataclass(frozen=True)
class Sample:
    """An answer in one format, and what it holds."""

    known: str
    text: str
    pieces: list[Piece]


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
