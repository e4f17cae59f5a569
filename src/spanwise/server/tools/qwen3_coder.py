"""Qwen3-Coder's format: a function and its parameters as tags, the values as bare text."""

from __future__ import annotations

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
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
MARKS = (BLOCK, BLOCK_END, FUNCTION_END, PARAMETER_END)


@dataclass(frozen=True, kw_only=True)
class Qwen3CoderCalls(ToolFormat):
    """One block a call. The models leave its opening mark out now and then."""

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        yield from cursor.follows(BLOCK)
        yield from cursor.space()
        yield from cursor.literal(FUNCTION)
        name = yield from cursor.until(">")
        if name not in tools:
            raise NotACallError("not the name of a tool")
        values: dict[str, str] = {}
        while True:
            yield from cursor.space()
            if not (yield from cursor.follows(PARAMETER)):
                break
            key = yield from cursor.until(">")
            value = yield from cursor.until(PARAMETER_END)
            # A line of its own for the value is the format's, not the value's.
            values[key] = value.removeprefix("\n").removesuffix("\n")
        yield from cursor.literal(FUNCTION_END)
        yield from cursor.close(BLOCK_END)
        yield RawCall(name, json_arguments(values, tools[name]))

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        call = grammar.one_of(_call(grammar, tool) for tool in tools)
        between = grammar.literal("\n")
        return f"{call} ({between} {call})*" if parallel else call


def _call(grammar: LarkGrammar, tool: Tool) -> str:
    line = grammar.literal("\n")
    parts = [grammar.literal(f"{BLOCK}\n{FUNCTION}{tool.name}>\n")]
    for key, (schema, required) in arguments(tool.parameters).items():
        head = grammar.literal(f"{PARAMETER}{key}>\n")
        value = write_value(grammar, schema, tool, f"\n{PARAMETER_END}", PARAMETER_END)
        parameter = f"{head} {value} {line}"
        parts.append(parameter if required else f"({parameter})?")
    return " ".join([*parts, grammar.literal(f"{FUNCTION_END}\n{BLOCK_END}")])
