"""Writes a grammar in llguidance's dialect of Lark.

A token of its own, like ``<tool_call>`` in many tokenizers, never matches the characters it stands
for: llguidance wants it by id. So every mark of a format is written by id where the tokenizer
has a token for it, and as text where it has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The spacing of Python's json module, in which templates show calls to models; free space would let
# a model write nothing else.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY_TEXT = "/(?s:.*)/"


class LarkGrammar:
    """The rules of one grammar. Every method returns an expression to put into a rule."""

    def __init__(self, marks: Sequence[str], added_tokens: Mapping[str, int]) -> None:
        self._ids = {mark: added_tokens[mark] for mark in marks if mark in added_tokens}
        self._marks = re.compile(f"({'|'.join(map(re.escape, self._ids)) or '(?!)'})")
        self._rules: list[str] = []

    def literal(self, text: str) -> str:
        """Exactly this text."""
        pieces = (piece for piece in self._marks.split(text) if piece)
        return " ".join(
            f"<[{self._ids[piece]}]>" if piece in self._ids else _quoted(piece) for piece in pieces
        )

    def json(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """JSON of the schema; without ``strict``, what cannot be enforced of it is passed over."""
        style = {**_JSON_STYLE, "lenient": not strict}
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': style})}")

    def until(self, mark: str) -> str:
        """Any text, and the mark that ends it."""
        if mark in self._ids:
            return self.rule(f"{self.rule(_ANY_TEXT)} {self.literal(mark)}")
        return self.rule(_ANY_TEXT, f"suffix={_quoted(mark)}")

    def rule(self, body: str, option: str = "") -> str:
        """A rule of its own."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}[{option}]: {body}" if option else f"{name}: {body}")
        return name

    def one_of(self, options: Iterable[str]) -> str:
        """Any one of the expressions."""
        return self.rule(" | ".join(options))

    def text(self, start: str) -> str:
        """The grammar whose answers match ``start``."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
