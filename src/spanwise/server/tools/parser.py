"""Finds the calls in an answer while it is being written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spanwise.server.tools.call import Calls, RawCall, Thinking
from spanwise.server.tools.call_id import call_id
from spanwise.server.tools.cursor import SPACES, Cursor, NotACallError, UnfinishedCallError
from spanwise.server.tools.events import CallArguments, CallEnd, CallStart, Text, ToolEvent
from spanwise.server.tools.tool import Tool

if TYPE_CHECKING:
    from spanwise.server.tools.tool_format import ToolFormat


class ToolParser:
    """Turns one answer's text into events, the same ones however the text is cut into pieces.

    A call is given when all of it is there and sound; whatever proves to be none comes out as text,
    every character of it once. White space that only stands between calls, or between a call and
    the beginning or the end of the answer or of its thinking, belongs to the format and is dropped.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        tools: Sequence[Tool],
        request_id: str,
        *,
        parallel: bool,
        thinking: bool,
    ) -> None:
        self._format = tool_format
        self._tools = {tool.name: tool for tool in tools}
        self._request_id, self._parallel = request_id, parallel
        self._marks = _Marks(tool_format)
        self._cursor = Cursor()
        self._calls: Calls | None = None  # the reading under way
        self._opening = ""  # what began it, until it has given a call
        self._thinking = thinking
        self._blank = ""  # white space that may yet prove to be the format's
        self._fresh = True  # nothing but white space since a border
        self._events: list[ToolEvent] = []
        self.num_calls = 0
        self.done = False

    def feed(self, text: str) -> list[ToolEvent]:
        """What is certain now. Where ``done``, the answer has ended: more text is of no use."""
        if self.done:
            return []
        self._cursor.text += text
        return self._advance()

    def finish(self) -> list[ToolEvent]:
        """What is left, now that no more text comes."""
        if self.done:
            return []
        self._cursor.ended = True
        events = self._advance()
        if self._blank and not self.num_calls:
            events.append(Text(self._blank))
        self.done = True
        return events

    def _advance(self) -> list[ToolEvent]:
        while not self.done and self._step():
            pass
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Go on by one border; False where only more text helps."""
        if self._calls is not None:
            return self._read(self._calls)
        return self._think() if self._thinking else self._search()

    def _search(self) -> bool:
        """Pass on text up to the next mark."""
        if self._fresh:
            rest = self._cursor.text.lstrip(SPACES)
            self._blank += self._cursor.drop(len(self._cursor.text) - len(rest))
        at, mark = self._marks.find(self._cursor, self._fresh)
        self._say(self._cursor.drop(at))
        if mark is None:
            return False
        if mark == self._marks.thought:
            self._say(self._cursor.drop(len(mark)))
            self._thinking = True
        else:
            self._calls, self._opening = self._format.read(self._cursor, self._tools), mark
        return True

    def _think(self) -> bool:
        """Pass on text up to the end of the thinking."""
        closing, text = self._marks.closing, self._cursor.text
        at = text.find(closing)
        if at < 0:
            held = 0 if self._cursor.ended else _half(text, closing)
            self._say(self._cursor.drop(len(text) - held))
            return False
        self._say(self._cursor.drop(at + len(closing)))
        self._thinking, self._fresh = False, True
        return True

    def _read(self, calls: Calls) -> bool:
        """Go on with a reading up to the next call."""
        try:
            call = next(calls)
        except StopIteration:
            self._cursor.drop(self._cursor.at)
            self._calls = None
            return True
        except UnfinishedCallError:
            self._calls = None
            self._say(self._cursor.drop(len(self._cursor.text)))
            return False
        except NotACallError:
            self._calls = None
            self._say(self._cursor.drop(len(self._opening)))
            return True
        if call is None:
            assert not self._cursor.ended, "a reading waits at the end of its text"
            return False
        self._give(call)
        return True

    def _give(self, call: RawCall) -> None:
        self._cursor.drop(self._cursor.at)
        self._blank, self._opening, self._fresh = "", "", True
        index, short = self.num_calls, self._format.short_ids
        self._events += [
            CallStart(index, call_id(self._request_id, index, short=short), call.name),
            CallArguments(index, call.arguments),
            CallEnd(index),
        ]
        self.num_calls += 1
        self.done = not self._parallel

    def _say(self, text: str) -> None:
        if not text:
            return
        text, self._blank, self._fresh = self._blank + text, "", False
        if self._events and isinstance(last := self._events[-1], Text):
            self._events[-1] = Text(last.text + text)
        else:
            self._events.append(Text(text))


class _Marks:
    """What may begin a call or a thinking block."""

    def __init__(self, tool_format: ToolFormat) -> None:
        block = tool_format.thinking
        self.thought = block.opening if block else ""
        self.closing = block.closing if block else Thinking.closing
        always = (self.thought if block and block.anywhere else "", *tool_format.openings)
        # The thinking's mark comes first: it may begin like a call's.
        self._at_start = tuple(filter(None, (self.thought, tool_format.bare, *always)))
        self._always = tuple(filter(None, always))
        self._firsts = re.compile("|".join({re.escape(mark[0]) for mark in self._at_start}))

    def find(self, cursor: Cursor, fresh: bool) -> tuple[int, str | None]:
        """Where the next mark stands, and which; None for one that may only begin there.

        Without any, the end of the text.
        """
        text = cursor.text
        for first in self._firsts.finditer(text):
            at = first.start()
            for mark in self._at_start if fresh and at == 0 else self._always:
                have = text[at : at + len(mark)]
                if have == mark:
                    return at, mark
                if mark.startswith(have) and not cursor.ended:
                    return at, None
        return len(text), None


def _half(text: str, mark: str) -> int:
    """How many characters at the end of the text may begin the mark."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
