"""Calls as a list of Python calls with keyword arguments, as Llama 3.2 and 4 can write them.

The list is read by a grammar of its own, of literals only: nothing is ever evaluated.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, RawCall
from spanwise.server.tools.cursor import Cursor, NotACallError, Reading
from spanwise.server.tools.json_reader import MAX_DEPTH, read_number
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.schema import Schema, arguments, json_types, object_json, standalone
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

START, END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w-]*", re.ASCII)
# Wider than Python's: a schema may call its properties what it likes.
_KEYWORD = re.compile(r"[^\s=,()\[\]{}'\"]*")
_WORDS = {"True": "true", "False": "false", "None": "null"}
# Grammars and models that know JSON better write its words.
_WORDS |= {word: word for word in _WORDS.values()}
_PLAIN = {quote: re.compile(rf"[^{quote}\\\n]*") for quote in "'\""}
_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b"}
_ESCAPES |= {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_OCTAL_DIGITS = tuple("01234567")
_HEX = re.compile(r"[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class PythonicCalls(ToolFormat):
    """``[name(key=value, ...), ...]`` and nothing before it."""

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        marked = yield from cursor.follows(START)
        yield from cursor.space()
        yield from cursor.literal("[")
        calls = []
        while True:
            yield from cursor.space()
            calls.append((yield from _call(cursor, tools)))
            yield from cursor.space()
            if not (yield from cursor.follows(",")):
                break
        yield from cursor.literal("]")
        if marked:
            yield from cursor.close(END)
        # Only the bracket at the end tells a list of calls from prose about one.
        yield from calls

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        call = grammar.one_of(_write_call(grammar, tool) for tool in tools)
        return f'"[" {call} (", " {call})* "]"' if parallel else f'"[" {call} "]"'


def _call(cursor: Cursor, tools: Mapping[str, Tool]) -> Reading[RawCall]:
    name = yield from cursor.run(_NAME)
    if name not in tools:
        raise NotACallError("not the name of a tool")
    yield from cursor.literal("(")
    values: dict[str, str] = {}
    yield from cursor.space()
    if not (yield from cursor.follows(")")):
        while True:
            key = yield from cursor.run(_KEYWORD)
            if not key or key in values:
                raise NotACallError("no keyword, or one given twice")
            yield from cursor.space()
            yield from cursor.literal("=")
            yield from cursor.space()
            values[key] = yield from _value(cursor)
            yield from cursor.space()
            if not (yield from cursor.follows(",")):
                break
            yield from cursor.space()
        yield from cursor.literal(")")
    return RawCall(name, object_json(values))


def _value(cursor: Cursor, depth: int = 0) -> Reading[str]:
    """The JSON of one literal. Raises NotACallError."""
    if depth == MAX_DEPTH:
        raise NotACallError(f"nested deeper than {MAX_DEPTH}")
    first = yield from cursor.peek()
    match first:
        case "'" | '"':
            return _quoted((yield from _string(cursor, first)))
        case "[":
            items = yield from _items(cursor, "[", "]", lambda: _value(cursor, depth + 1))
            return "[" + ", ".join(items) + "]"
        case "{":
            pairs = yield from _items(cursor, "{", "}", lambda: _pair(cursor, depth + 1))
            return "{" + ", ".join(pairs) + "}"
        case "":
            yield from cursor.more()
    if first in "-0123456789":
        return (yield from read_number(cursor))
    word = yield from cursor.run(_NAME)
    if word not in _WORDS:
        raise NotACallError("not a literal")
    return _WORDS[word]


def _items(
    cursor: Cursor, opening: str, closing: str, item: Callable[[], Reading[str]]
) -> Reading[list[str]]:
    """What stands between two brackets, separated by commas."""
    yield from cursor.literal(opening)
    yield from cursor.space()
    found: list[str] = []
    while not (yield from cursor.follows(closing)):
        if found:
            yield from cursor.literal(",")
            yield from cursor.space()
        found.append((yield from item()))
        yield from cursor.space()
    return found


def _pair(cursor: Cursor, depth: int) -> Reading[str]:
    quote = yield from cursor.peek()
    if quote not in ("'", '"'):
        raise NotACallError("keys are strings")
    key = _quoted((yield from _string(cursor, quote)))
    yield from cursor.space()
    yield from cursor.literal(":")
    yield from cursor.space()
    return f"{key}: {(yield from _value(cursor, depth))}"


def _string(cursor: Cursor, quote: str) -> Reading[str]:
    """The text a string stands for."""
    yield from cursor.literal(quote)
    pieces = []
    while True:
        pieces.append((yield from cursor.run(_PLAIN[quote])))
        if not (yield from cursor.follows("\\")):
            break
        pieces.append((yield from _escape(cursor)))
    yield from cursor.literal(quote)
    return "".join(pieces)


def _escape(cursor: Cursor) -> Reading[str]:
    letter = yield from _take(cursor, 1)
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    if letter in _HEX_DIGITS:
        return _character((yield from _take(cursor, _HEX_DIGITS[letter])), 16)
    if letter in _OCTAL_DIGITS:
        while len(letter) < 3 and (yield from cursor.peek()) in _OCTAL_DIGITS:
            letter += yield from _take(cursor, 1)
        return _character(letter, 8)
    if letter == "N":
        raise NotACallError("characters by name are not read")
    return "\\" + letter


def _take(cursor: Cursor, count: int) -> Reading[str]:
    while len(cursor.text) < cursor.at + count:
        yield from cursor.more()
    cursor.at += count
    return cursor.text[cursor.at - count : cursor.at]


def _character(digits: str, base: int) -> str:
    if not _HEX.fullmatch(digits) or int(digits, base) > sys.maxunicode:
        raise NotACallError("not an escape")
    return chr(int(digits, base))


def _quoted(text: str) -> str:
    """The JSON string; halves of surrogate pairs stay escapes, for they cannot be encoded."""
    has_halves = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(text, ensure_ascii=has_halves)


def _write_call(grammar: LarkGrammar, tool: Tool) -> str:
    """One call, its arguments in the schema's order."""
    # From the last argument back: what may follow where none stands yet, and where one does.
    first = rest = ""
    for key, (schema, required) in reversed(arguments(tool.parameters).items()):
        item = f"{grammar.literal(f'{key}=')} {_write_value(grammar, schema, tool)}"
        options = [f"{item} {rest}"], [f'", " {item} {rest}']
        if not required:
            options[0].append(first or '""')
            options[1].append(rest or '""')
        first, rest = grammar.one_of(options[0]), grammar.one_of(options[1])
    return f'"{tool.name}(" {first} ")"'


def _write_value(grammar: LarkGrammar, schema: Schema, tool: Tool) -> str:
    types = json_types(schema, tool.parameters)
    if types == {"boolean"}:
        return '("True" | "False")'
    if types == {"null"}:
        return '"None"'
    return grammar.json(standalone(schema, tool.parameters), strict=tool.strict)
