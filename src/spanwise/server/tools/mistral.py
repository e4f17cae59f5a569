"""Mistral's newer format: ``[TOOL_CALLS]name[ARGS]{...}``, in between an id for some models.

https://github.com/mistralai/mistral-common, tokenizer versions 11 and 13; up to version 7 the calls
were a JSON list after the same mark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, RawCall
from spanwise.server.tools.cursor import Cursor, NotACallError
from spanwise.server.tools.json_calls import read_arguments, read_list, write_arguments
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

OPENING = "[TOOL_CALLS]"
_ARGUMENTS = "[ARGS]"
_ID = "[CALL_ID]"
MARKS = (OPENING, _ARGUMENTS, _ID)
_NAME = re.compile(r"[\w-]*", re.ASCII)
_ID_LETTERS = re.compile(r"[a-zA-Z0-9]*")


@dataclass(frozen=True, kw_only=True)
class MistralCalls(ToolFormat):
    """A name and its arguments after every mark. ``with_ids``: the model writes an id between."""

    with_ids: bool = False

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        yield from cursor.literal(OPENING)
        yield from cursor.space()
        if (yield from cursor.peek()) == "[":
            yield from read_list(cursor, tools)
            return
        name = yield from cursor.run(_NAME)
        if name not in tools:
            raise NotACallError("not the name of a tool")
        if (yield from cursor.follows(_ID)):
            yield from cursor.run(_ID_LETTERS)
        yield from cursor.follows(_ARGUMENTS)
        yield from cursor.space()
        yield RawCall(name, (yield from read_arguments(cursor)))

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        name_end = grammar.literal(_ARGUMENTS)
        if self.with_ids:
            name_end = f"{grammar.literal(_ID)} /[a-zA-Z0-9]{{9}}/ {name_end}"
        call = grammar.one_of(
            f"{grammar.literal(OPENING + tool.name)} {name_end} {write_arguments(grammar, tool)}"
            for tool in tools
        )
        return f"{call}+" if parallel else call
