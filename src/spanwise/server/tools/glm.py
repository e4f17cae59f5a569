"""The format of GLM 4.5 and later: a name, then keys and values between tags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.bare_values import json_arguments, write_value
from spanwise.server.tools.call import Calls, RawCall
from spanwise.server.tools.cursor import Cursor, NotACallError
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.schema import arguments
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

BLOCK, BLOCK_END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
MARKS = (BLOCK, BLOCK_END, KEY, KEY_END, VALUE, VALUE_END)
_NAME = re.compile(r"[\w-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class GlmCalls(ToolFormat):
    """One block a call. ``line``: what stands between its parts; later models write nothing."""

    line: str

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        yield from cursor.literal(BLOCK)
        yield from cursor.space()
        name = yield from cursor.run(_NAME)
        if name not in tools:
            raise NotACallError("not the name of a tool")
        values: dict[str, str] = {}
        while True:
            yield from cursor.space()
            if not (yield from cursor.follows(KEY)):
                break
            key = yield from cursor.until(KEY_END)
            yield from cursor.space()
            yield from cursor.literal(VALUE)
            values[key.strip()] = yield from cursor.until(VALUE_END)
        # Nothing else tells that no argument is missing.
        yield from cursor.literal(BLOCK_END)
        yield RawCall(name, json_arguments(values, tools[name]))

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        call = grammar.one_of(self._call(grammar, tool) for tool in tools)
        between = grammar.literal("\n")
        return f"{call} ({between} {call})*" if parallel else call

    def _call(self, grammar: LarkGrammar, tool: Tool) -> str:
        parts = [grammar.literal(f"{BLOCK}{tool.name}{self.line}")]
        for key, (schema, required) in arguments(tool.parameters).items():
            head = grammar.literal(f"{KEY}{key}{KEY_END}{self.line}{VALUE}")
            value = write_value(grammar, schema, tool, VALUE_END, VALUE_END)
            pair = f"{head} {value} {grammar.literal(self.line)}"
            parts.append(pair if required else f"({pair})?")
        return " ".join([*parts, grammar.literal(BLOCK_END)])
