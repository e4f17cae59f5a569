"""What has been said of a request, so that it can be said again from its beginning."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TokenLogprobs

# About what Python takes: a number in a list; the logprobs of a token, and one more of its best
# tokens; whatever else there is of a request.
_NUMBER_BYTES, _LOGPROBS_BYTES, _TOP_BYTES, _REST_BYTES = 40, 320, 80, 4096


class Replay:
    """The updates of all choices of a request, those of one choice in one."""

    def __init__(self, prompt_token_ids: tuple[int, ...], num_choices: int) -> None:
        self.prompt_token_ids = prompt_token_ids
        self._choices = [_Choice() for _ in range(num_choices)]

    def take(self, choice: int, update: SequenceUpdate, at: int) -> None:
        """Take in what is new of a choice, and when it came (Unix time)."""
        self._choices[choice].take(update)
        self._choices[choice].at = at

    def cut(self, choice: int, num_tokens: int) -> None:
        """Of a choice no more was wanted than its first tokens."""
        self._choices[choice].cut(num_tokens)

    def updates(self) -> list[tuple[int, SequenceUpdate, int]]:
        """Everything so far, choice by choice, and when the last of it came.

        A choice that was cut ends with an update of its own, without tokens: whoever reads them
        finds the true end among them, as it was found the first time.
        """
        return [
            (index, update, choice.at)
            for index, choice in enumerate(self._choices)
            for update in choice.updates()
        ]

    @property
    def num_bytes(self) -> int:
        """About what it takes to keep."""
        num_numbers = len(self.prompt_token_ids)
        num_bytes = _REST_BYTES
        for choice in self._choices:
            num_numbers += len(choice.token_ids)
            for each in (*choice.logprobs, *choice.prompt_logprobs):
                num_bytes += _LOGPROBS_BYTES + _TOP_BYTES * len(each.top_ids)
        return num_bytes + _NUMBER_BYTES * num_numbers


@dataclass
class _Choice:
    """Updates in one: what grows, and the rest of it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: SequenceUpdate | None = None
    num_cached_tokens: int = 0
    is_cut: bool = False
    at: int = 0

    def take(self, update: SequenceUpdate) -> None:
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        self.last = msgspec.structs.replace(
            update, token_ids=(), logprobs=(), prompt_logprobs=(), num_cached_tokens=0
        )

    def cut(self, num_tokens: int) -> None:
        self.is_cut |= num_tokens < len(self.token_ids) or not self._has_ended
        del self.token_ids[num_tokens:], self.logprobs[num_tokens:]

    @property
    def _has_ended(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    def updates(self) -> list[SequenceUpdate]:
        if self.last is None:
            return []
        end = SequenceUpdate(sequence_id=self.last.sequence_id, finish_reason="stop")
        told = msgspec.structs.replace(
            self.last,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            num_cached_tokens=self.num_cached_tokens,
        )
        if not self.is_cut:
            return [told]
        return [msgspec.structs.replace(told, finish_reason=None, stop_reason=None), end]
