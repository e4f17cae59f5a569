"""Calls as JSON objects that hold the function's name: what most models write, in marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, RawCall
from spanwise.server.tools.cursor import Cursor, NotACallError, Reading
from spanwise.server.tools.json_reader import read_json, read_object
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.schema import closed
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

_ARGUMENTS_KEYS = ("arguments", "parameters")
# Some models add these; they say nothing that the name does not.
_IDLE_KEYS = ("id", "type")


@dataclass(frozen=True, kw_only=True)
class JsonCalls(ToolFormat):
    """``{"name": ..., "arguments": {...}}`` after an opening, alone or in a list.

    ``before``, ``between`` and ``after`` are written around the calls; ``closing`` is the mark that
    must come after them. ``each``: every call stands in marks of its own. ``single``: the template
    takes one call in an answer.
    """

    arguments_key: str = "arguments"
    closing: str = ""
    before: str = ""
    between: str = ", "
    after: str = ""
    each: bool = False
    single: bool = False

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        yield from cursor.follows(*self.openings)
        yield from cursor.space()
        if (yield from cursor.peek()) == "[":
            yield from read_list(cursor, tools)
            end = cursor.at
            yield from cursor.space()
            if not (yield from cursor.follows(*filter(None, [self.closing]))):
                cursor.at = end
            return
        while True:
            call = yield from read_call(cursor, tools)
            if self.closing:
                yield from cursor.close(self.closing)
            yield call
            if not self.bare or not (yield from _goes_on(cursor)):
                return

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        call = write_calls(grammar, tools, self._head, "}")
        before, after = grammar.literal(self.before), grammar.literal(self.after)
        between = grammar.literal(self.between)
        if self.each:
            call = grammar.rule(f"{before} {call} {after}")
        calls = f"{call} ({between} {call})*" if parallel and not self.single else call
        return calls if self.each else f"{before} {calls} {after}"

    def _head(self, name: str) -> str:
        return f'{{"name": {json.dumps(name)}, "{self.arguments_key}": '


def write_calls(
    grammar: LarkGrammar, tools: Sequence[Tool], before: Callable[[str], str], after: str
) -> str:
    """One call of any of the tools, its arguments as JSON; ``before`` is given the name."""
    return grammar.one_of(
        f"{grammar.literal(before(tool.name))} {write_arguments(grammar, tool)} "
        f"{grammar.literal(after)}"
        for tool in tools
    )


def write_arguments(grammar: LarkGrammar, tool: Tool) -> str:
    """The tool's arguments as one JSON object."""
    return grammar.json(closed(tool.parameters), strict=tool.strict)


def read_list(cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
    """The calls of a JSON list. Raises NotACallError."""
    yield from cursor.literal("[")
    while True:
        yield from cursor.space()
        yield (yield from read_call(cursor, tools))
        yield from cursor.space()
        if not (yield from cursor.follows(",")):
            break
    # A token limit may take the bracket away; the calls are whole without it.
    yield from cursor.close("]")


def read_call(cursor: Cursor, tools: Mapping[str, Tool]) -> Reading[RawCall]:
    """One object that names a tool and holds its arguments. Raises NotACallError."""
    found: dict[str, str] = {}

    def member(key: str) -> Reading[None]:
        field = "arguments" if key in _ARGUMENTS_KEYS else key
        if field in found or field not in ("name", "arguments", *_IDLE_KEYS):
            raise NotACallError("no member of a call")
        if field == "arguments" and (yield from cursor.peek()) not in ("{", ""):
            raise NotACallError("arguments are an object")
        found[field] = yield from read_json(cursor)
        if field == "name" and json.loads(found[field]) not in tools:
            raise NotACallError("not the name of a tool")

    yield from read_object(cursor, member)
    if not {"name", "arguments"} <= found.keys():
        raise NotACallError("no name, or no arguments")
    return RawCall(json.loads(found["name"]), found["arguments"])


def read_arguments(cursor: Cursor) -> Reading[str]:
    """An object of arguments on its own. Raises NotACallError."""
    start = cursor.at
    yield from read_object(cursor, lambda _: read_json(cursor, 1))
    return cursor.text[start : cursor.at]


def _goes_on(cursor: Cursor) -> Reading[bool]:
    """Whether a semicolon and another object follow; passes over the semicolon."""
    end = cursor.at
    yield from cursor.space()
    if (yield from cursor.follows(";")):
        yield from cursor.space()
        if (yield from cursor.peek()) == "{":
            return True
    cursor.at = end
    return False
