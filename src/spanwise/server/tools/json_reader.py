"""Reads JSON from growing text, by the letter of RFC 8259, and keeps it as it is written.

Not decoded and written anew: numbers keep their digits, and half a surrogate pair stays an escape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from spanwise.server.tools.cursor import Cursor, NotACallError, Reading, read_whole

MAX_DEPTH = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_NUMBER_LETTERS = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}


def read_json(cursor: Cursor, depth: int = 0) -> Reading[str]:
    """One value, as it is written. Raises NotACallError."""
    start = cursor.at
    first = yield from cursor.peek()
    match first:
        case "{":
            yield from read_object(cursor, lambda _: read_json(cursor, depth + 1), depth)
        case "[":
            yield from _array(cursor, depth)
        case '"':
            yield from _string(cursor)
        case "t" | "f" | "n":
            yield from cursor.literal(_WORDS[first])
        case "":
            yield from cursor.more()
        case _:
            yield from read_number(cursor)
    return cursor.text[start : cursor.at]


def read_object(
    cursor: Cursor, member: Callable[[str], Reading[object]], depth: int = 0
) -> Reading[None]:
    """An object; ``member(key)`` reads each value. Raises NotACallError."""
    _check(depth)
    yield from cursor.literal("{")
    yield from cursor.space()
    if (yield from cursor.follows("}")):
        return
    while True:
        start = cursor.at
        yield from _string(cursor)
        key = json.loads(cursor.text[start : cursor.at])
        yield from cursor.space()
        yield from cursor.literal(":")
        yield from cursor.space()
        yield from member(key)
        yield from cursor.space()
        if not (yield from cursor.follows(",")):
            break
        yield from cursor.space()
    yield from cursor.literal("}")


def read_number(cursor: Cursor) -> Reading[str]:
    """A number, as it is written. Raises NotACallError."""
    number = yield from cursor.run(_NUMBER_LETTERS)
    if not _NUMBER.fullmatch(number):
        raise NotACallError("not a number")
    return number


def json_kind(text: str) -> str | None:
    """The JSON schema type of a text that is one JSON value, None where it is not one."""
    cursor = Cursor(text, ended=True)
    try:
        read_whole(read_json(cursor))
    except NotACallError:
        return None
    if cursor.at != len(text):
        return None
    kinds = {"{": "object", "[": "array", '"': "string", "n": "null", "t": "boolean"}
    number = _NUMBER.fullmatch(text)
    if number is None:
        return kinds.get(text[0], "boolean")
    return "number" if number[1] or number[2] else "integer"


def _array(cursor: Cursor, depth: int) -> Reading[None]:
    _check(depth)
    yield from cursor.literal("[")
    yield from cursor.space()
    if (yield from cursor.follows("]")):
        return
    while True:
        yield from read_json(cursor, depth + 1)
        yield from cursor.space()
        if not (yield from cursor.follows(",")):
            break
        yield from cursor.space()
    yield from cursor.literal("]")


def _string(cursor: Cursor) -> Reading[None]:
    yield from cursor.literal('"')
    while True:
        yield from cursor.run(_PLAIN)
        if not (yield from cursor.follows("\\")):
            break
        yield from _escape(cursor)
    yield from cursor.literal('"')


def _escape(cursor: Cursor) -> Reading[None]:
    letter = yield from cursor.peek()
    cursor.at += len(letter)
    if letter == "u":
        while len(cursor.text) < cursor.at + 4:
            yield from cursor.more()
        if not _HEX.match(cursor.text, cursor.at):
            raise NotACallError("not an escape")
        cursor.at += 4
    elif not letter:
        yield from cursor.more()
    elif letter not in '"\\/bfnrt':
        raise NotACallError("not an escape")


def _check(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise NotACallError(f"nested deeper than {MAX_DEPTH}")
