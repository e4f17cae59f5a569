"""What was said so far."""

from __future__ import annotations

from typing import NamedTuple


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Conversation:
    """The system message, where there is one, and the turns after it.

    A question joins only together with its answer, so that what a failed or stopped request leaves
    behind is a conversation that any chat template takes.
    """

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.turns: list[Turn] = []

    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI's messages."""
        messages = [] if self.system is None else [_message("system", self.system)]
        for turn in self.turns:
            messages += [_message("user", turn.question), _message("assistant", turn.answer)]
        return messages

    def asking(self, question: str, *, again: bool = False) -> list[dict[str, str]]:
        """The messages that ask a question; ``again``: in the place of the last turn."""
        messages = self.messages()
        return [*(messages[:-2] if again else messages), _message("user", question)]

    def add(self, turn: Turn, *, again: bool = False) -> None:
        """Add a turn; ``again``: in the place of the last."""
        if again:
            self.turns.pop()
        self.turns.append(turn)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
