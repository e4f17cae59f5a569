"""DeepSeek's format: a section of calls, each a name and its arguments between marks.

V3 and R1 write the word ``function``, a mark and the name, and fence the arguments as JSON; V3.1
writes the name, the mark and the arguments bare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, RawCall
from spanwise.server.tools.cursor import Cursor, NotACallError
from spanwise.server.tools.json_calls import read_arguments, write_calls
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

_BAR = "\N{FULLWIDTH VERTICAL LINE}"
SECTION = f"<{_BAR}tool▁calls▁begin{_BAR}>"
SECTION_END = f"<{_BAR}tool▁calls▁end{_BAR}>"
CALL = f"<{_BAR}tool▁call▁begin{_BAR}>"
CALL_END = f"<{_BAR}tool▁call▁end{_BAR}>"
SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"
MARKS = (SECTION, SECTION_END, CALL, CALL_END, SEPARATOR)
_NAME = re.compile(r"[\w-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DeepSeekCalls(ToolFormat):
    """What stands around a call's name and its arguments, and between two calls."""

    before_name: str
    after_name: str
    after: str
    between: str

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        yield from cursor.follows(SECTION)
        while True:
            yield from cursor.space()
            yield from cursor.literal(self.before_name)
            yield from cursor.space()
            name = yield from cursor.run(_NAME)
            if name not in tools:
                raise NotACallError("not the name of a tool")
            yield from cursor.literal(self.after_name)
            yield from cursor.space()
            arguments = yield from read_arguments(cursor)
            yield from cursor.close(self.after.lstrip())
            yield RawCall(name, arguments)
            end = cursor.at
            yield from cursor.space()
            if (yield from cursor.follows(SECTION_END)):
                return
            if not (yield from cursor.follows(CALL)):
                cursor.at = end
                return
            cursor.at = end

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        call = write_calls(
            grammar, tools, lambda name: self.before_name + name + self.after_name, self.after
        )
        between = grammar.literal(self.between)
        calls = f"{call} ({between} {call})*" if parallel else call
        return f"{grammar.literal(SECTION)} {calls} {grammar.literal(SECTION_END)}"
