"""The harmony format of gpt-oss: a message on a channel, sent to a function.

https://cookbook.openai.com/articles/openai-harmony. What the model thinks stands in messages on
the channel ``analysis``. A message ends the answer, so there is one call at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, RawCall, Thinking
from spanwise.server.tools.cursor import Cursor, NotACallError, Reading
from spanwise.server.tools.json_calls import read_arguments, write_calls
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.tool import Tool
from spanwise.server.tools.tool_format import ToolFormat

_START, _CHANNEL, _MESSAGE = "<|start|>assistant", "<|channel|>", "<|message|>"
_CONSTRAIN, _CALL, _END = "<|constrain|>", "<|call|>", "<|end|>"
RECIPIENT = "to=functions."
OPENINGS = (_START, _CHANNEL)
MARKS = ("<|start|>", _CHANNEL, _MESSAGE, _CONSTRAIN, _CALL, _END)
ANALYSIS = Thinking(f"{_CHANNEL}analysis{_MESSAGE}", _END, anywhere=True, resume=_START)

# The recipient may stand before or after the channel; what follows it says that JSON comes.
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?"
    r"(?: ?to=functions\.(?P<first>[\w-]{1,64}))?"
    r"<\|channel\|>(?:commentary|analysis)"
    r"(?: to=functions\.(?P<second>[\w-]{1,64}))?"
    r" ?(?:<\|constrain\|>)?(?:json)? ?",
    re.ASCII,
)
_MAX_HEADER = 256  # characters: more than any header that is one


@dataclass(frozen=True, kw_only=True)
class HarmonyCalls(ToolFormat):
    """A header that names a function, and a message that is its arguments."""

    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """See ToolFormat."""
        header = _HEADER.fullmatch((yield from _header(cursor)))
        name = (header["first"] or header["second"]) if header else None
        if name is None or name not in tools:
            raise NotACallError("not sent to a tool")
        yield from cursor.space()
        arguments = yield from read_arguments(cursor)
        yield from cursor.close(_CALL)
        yield RawCall(name, arguments)

    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """See ToolFormat."""
        calls = (
            write_calls(grammar, tools, before, "") for before in (_channel_first, _recipient_first)
        )
        # The mark usually ends the generation, and then it is no part of what has to match.
        return f"{grammar.one_of(calls)} ({grammar.literal(_CALL)})?"


def _channel_first(name: str) -> str:
    return f"{_CHANNEL}commentary {RECIPIENT}{name} {_CONSTRAIN}json{_MESSAGE}"


def _recipient_first(name: str) -> str:
    return f" {RECIPIENT}{name}{_CHANNEL}commentary json{_MESSAGE}"


def _header(cursor: Cursor) -> Reading[str]:
    """The text up to where the message begins. Raises NotACallError."""
    start = cursor.at
    while (found := cursor.text.find(_MESSAGE, start)) < 0:
        if len(cursor.text) - start > _MAX_HEADER:
            raise NotACallError("too long for a header")
        yield from cursor.more()
    cursor.at = found + len(_MESSAGE)
    return cursor.text[start:found]
