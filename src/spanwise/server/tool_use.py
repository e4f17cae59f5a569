"""How one request's tools are offered, enforced and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spanwise.engine.tokenizer import Tokenizer
from spanwise.server.errors import bad_request
from spanwise.server.tools.formats import HERMES, tool_format
from spanwise.server.tools.parser import ToolParser
from spanwise.server.tools.tool import Tool, ToolChoice
from spanwise.server.tools.tool_format import ToolFormat
from spanwise.types.sampling import Grammar

# Of a prompt, enough to hold the opening of a thinking block.
_TAIL_TOKENS = 16


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may or must call, and the format it calls them in."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    choice: ToolChoice
    parallel: bool

    @property
    def is_forced(self) -> bool:
        """Whether the answer must call."""
        return self.choice.mode in ("required", "named")

    def grammar(self, tokenizer: Tokenizer, thinking: bool) -> Grammar:
        """What a forced answer must match. ``thinking``: the prompt ends within a thought."""
        return self.format.grammar(
            self.tools,
            self.choice,
            self.parallel,
            added_tokens=tokenizer.added_tokens,
            thinking=thinking,
        )

    def parser(self, answer_id: str, thinking: bool) -> ToolParser:
        """What finds the calls in one answer."""
        return self.format.parser(
            self.tools, request_id=answer_id, parallel=self.parallel, thinking=thinking
        )

    def is_thinking(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt ends within a thinking block."""
        block = self.format.thinking
        if block is None:
            return False
        tail = tokenizer.decode(prompt_token_ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        return tail.rfind(block.opening) > tail.rfind(block.closing)


def plan_tools(
    template: str | None, tools: tuple[Tool, ...], choice: ToolChoice, parallel: bool
) -> ToolUse:
    """How tools that may be called are used. Raises ApiError.

    A model whose template knows nothing of tools can be made to call, but not left to choose: it
    would never hear of them.
    """
    known = tool_format(template) if template is not None else None
    if known is None and choice.mode == "auto":
        raise bad_request(
            "tools are not supported with tool_choice auto: the model's chat template has no way "
            "of calling them that is known; use tool_choice required or name a function",
            "tools",
            "unsupported_parameter",
        )
    return ToolUse(known or HERMES, tools, choice, parallel)
