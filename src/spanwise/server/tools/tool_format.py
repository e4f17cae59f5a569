"""One way of writing tool calls: how it is read, and how a model is held to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spanwise.server.tools.call import Calls, Thinking
from spanwise.server.tools.cursor import Cursor
from spanwise.server.tools.lark import LarkGrammar
from spanwise.server.tools.parser import ToolParser
from spanwise.server.tools.tool import Tool, ToolChoice
from spanwise.types.sampling import Grammar

_NO_TOKENS: Mapping[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class ToolFormat(ABC):
    """One way of writing calls.

    ``openings`` begin calls wherever they stand, ``bare`` only where no text came before (or after
    the last call). ``marks`` may be tokens of their own. ``short_ids``: the template takes ids of
    nine characters only. ``thinking``: None where the model does not think.
    """

    name: str
    openings: tuple[str, ...]
    bare: str = ""
    marks: tuple[str, ...] = ()
    short_ids: bool = False
    thinking: Thinking | None = None

    @abstractmethod
    def read(self, cursor: Cursor, tools: Mapping[str, Tool]) -> Calls:
        """The calls at the cursor, which stands at an opening. Raises NotACallError.

        The cursor is committed after each call given, and where the reading returns.
        """

    @abstractmethod
    def write(self, grammar: LarkGrammar, tools: Sequence[Tool], parallel: bool) -> str:
        """The expression of one call, or of one or more where ``parallel``."""

    def is_thinking(self, prompt: str) -> bool:
        """Whether the prompt ends within a thinking block, so that the answer begins in it."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.opening)

    def parser(
        self,
        tools: Sequence[Tool],
        *,
        request_id: str = "",
        parallel: bool = True,
        thinking: bool = False,
    ) -> ToolParser:
        """A parser for one answer. ``thinking``: see ``is_thinking``.

        ``request_id`` makes the ids of the calls: the same id (with the choice's number, where a
        request has several) gives the same ids again. Without ``parallel`` the answer ends with its
        first call.
        """
        return ToolParser(self, tools, request_id, parallel=parallel, thinking=thinking)

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool = True,
        *,
        added_tokens: Mapping[str, int] = _NO_TOKENS,
        thinking: bool = False,
    ) -> Grammar:
        """What an answer must match that has to call: any of the tools, or the one named.

        ``added_tokens``: all the tokenizer's added tokens and their ids, special or not.
        ``thinking``: see ``is_thinking``.
        """
        assert choice.mode in ("required", "named"), "only a forced call has a grammar"
        wanted = [tool for tool in tools if choice.name in (None, tool.name)]
        block = self.thinking
        marks = self.marks if block is None else (*self.marks, block.opening, block.closing)
        grammar = LarkGrammar(marks, added_tokens)
        # A named function is called once: that is all that was asked for.
        calls = self.write(grammar, wanted, parallel and choice.mode == "required")
        return Grammar("lark", grammar.text(f"{_thought(grammar, block, thinking)} {calls}"))


def _thought(grammar: LarkGrammar, block: Thinking | None, thinking: bool) -> str:
    """The thinking that may, or where it has begun must, come before the calls."""
    if block is None:
        return ""
    resume = grammar.literal(block.resume) if block.resume else r"/[ \n]{0,4}/"
    rest = f"{grammar.until(block.closing)} {resume}"
    return rest if thinking else f"({grammar.literal(block.opening)} {rest})?"
