"""Answers that can be asked for again: which there are, and how long they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from spanwise.errors import KeyReusedError
from spanwise.types.resume import Resume

Part = TypeVar("Part")

MAX_KEPT_BYTES = 128 << 20
"""What the answers that have ended may take together."""


@dataclass
class _Answer(Generic[Part]):
    """The parts of one answer; ``num_bytes`` are those of the ones that have ended."""

    body: bytes
    parts: dict[int, Part] = field(default_factory=dict)
    num_bytes: dict[int, int] = field(default_factory=dict)
    drop_at_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return len(self.num_bytes) == len(self.parts)


class Answers(Generic[Part]):
    """Every answer with a key of its own, from its first part's beginning on.

    When all parts have ended it is kept for ``window_s``, and less long where there are more than
    ``max_bytes`` of them: the one that ended first goes first. A part that fails takes the answer
    along. Whoever drops parts from here is given them, to forget them too.
    """

    def __init__(self, window_s: float, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._window_s, self._max_bytes = window_s, max_bytes
        self._answers: dict[bytes, _Answer[Part]] = {}
        # Those that have ended, the first of them first, and what they take.
        self._ended: dict[bytes, _Answer[Part]] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def wake_at_s(self) -> float | None:
        """When the next answer is to be dropped."""
        return next((answer.drop_at_s for answer in self._ended.values()), None)

    def find(self, resume: Resume) -> Part | None:
        """The part that was asked for before, if any. Raises KeyReusedError."""
        answer = self._answers.get(resume.key)
        if answer is None:
            return None
        if answer.body != resume.body:
            raise KeyReusedError(
                "this Idempotency-Key came before with another request; use a new key for each"
            )
        return answer.parts.get(resume.part)

    def begin(self, resume: Resume, part: Part) -> None:
        """A part that was not found has begun."""
        answer = self._answers.setdefault(resume.key, _Answer(resume.body))
        assert resume.part not in answer.parts, "a part was begun twice"
        self._revive(resume.key)
        answer.parts[resume.part] = part

    def end(self, resume: Resume, num_bytes: int, now_s: float) -> list[Part]:
        """A part is complete, and takes so much to keep; give what is kept no more."""
        answer = self._answers[resume.key]
        answer.num_bytes[resume.part] = num_bytes
        if not answer.has_ended:
            return []
        self._ended[resume.key] = answer
        self._num_bytes += sum(answer.num_bytes.values())
        answer.drop_at_s = now_s + self._window_s
        dropped = self.expire(now_s)
        while self._num_bytes > self._max_bytes:
            dropped += self.forget(next(iter(self._ended)))
        return dropped

    def forget(self, key: bytes) -> list[Part]:
        """Drop an answer; give its parts."""
        self._revive(key)
        return list(self._answers.pop(key).parts.values())

    def expire(self, now_s: float) -> list[Part]:
        """Drop what has been kept for long enough; give its parts."""
        dropped: list[Part] = []
        while (wake_at_s := self.wake_at_s) is not None and wake_at_s <= now_s:
            dropped += self.forget(next(iter(self._ended)))
        return dropped

    def clear(self) -> None:
        """Drop everything."""
        self._answers.clear()
        self._ended.clear()
        self._num_bytes = 0

    def _revive(self, key: bytes) -> None:
        """Where the answer had ended, it has no more."""
        if (answer := self._ended.pop(key, None)) is not None:
            self._num_bytes -= sum(answer.num_bytes.values())
