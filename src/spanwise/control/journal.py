"""What was asked of the engine and what it has given: all a new engine needs to go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from spanwise.control.entries import (
    Accepted,
    Admitted,
    ChoiceRecord,
    Entry,
    Finished,
    Forgotten,
    Progress,
    Sent,
)
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.plan import TokenLogprobs


class Journal:
    """The entries so far, folded. An entry that contradicts those before it breaks an assertion."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._requests: dict[int, _Request] = {}
        self._choices: dict[int, _Choice] = {}
        for entry in entries:
            self.apply(entry)

    def __len__(self) -> int:
        return len(self._requests)

    def apply(self, entry: Entry) -> None:
        """Take in the next entry."""
        match entry:
            case Admitted():
                self._admit(entry)
            case Accepted():
                self._accept(entry)
            case Sent():
                for progress in entry.progress:
                    self._choices[progress.sequence_id].send(progress)
            case Finished():
                self._choices[entry.sequence_id].finish(entry)
            case Forgotten():
                for choice in self._requests.pop(entry.request_id).choices:
                    del self._choices[choice.sequence_id]

    def live(self) -> list[SequenceRequest]:
        """What has to be resumed: every unfinished choice with its tokens, oldest request first."""
        return [
            choice.to_resume(request.admitted)
            for request in self._requests.values()
            for choice in request.choices
            if not choice.finished
        ]

    def snapshot(self) -> list[Admitted]:
        """Every request not forgotten, as it stands, oldest first.

        These entries alone rebuild the journal. Finished choices are among them: the end of their
        text may not have been sent.
        """
        return [request.record() for request in self._requests.values()]

    def _admit(self, entry: Admitted) -> None:
        assert entry.request_id not in self._requests, "a request id was used twice"
        choices = tuple(_Choice(record) for record in entry.choices)
        # What the choices were admitted with stands in them; here it would only age.
        admitted = msgspec.structs.replace(entry, choices=())
        self._requests[entry.request_id] = _Request(admitted, choices)
        for choice in choices:
            assert choice.sequence_id not in self._choices, "a sequence id was used twice"
            self._choices[choice.sequence_id] = choice

    def _accept(self, entry: Accepted) -> None:
        logprobs = entry.logprobs or (None,) * len(entry.token_ids)
        for sequence_id, token_id, logprob in zip(
            entry.sequence_ids, entry.token_ids, logprobs, strict=True
        ):
            self._choices[sequence_id].accept(token_id, logprob)
        for finished in entry.finished:
            self._choices[finished.sequence_id].finish(finished)


class _Choice:
    """A ``ChoiceRecord`` that grows: two lists, and the rest of it."""

    def __init__(self, record: ChoiceRecord) -> None:
        self._token_ids = list(record.token_ids)
        self._logprobs = list(record.logprobs)
        self._rest = msgspec.structs.replace(record, token_ids=(), logprobs=())

    @property
    def sequence_id(self) -> int:
        return self._rest.sequence_id

    @property
    def finished(self) -> bool:
        return self._rest.finish_reason is not None

    def record(self) -> ChoiceRecord:
        return msgspec.structs.replace(
            self._rest, token_ids=tuple(self._token_ids), logprobs=tuple(self._logprobs)
        )

    def to_resume(self, request: Admitted) -> SequenceRequest:
        return SequenceRequest(
            sequence_id=self.sequence_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=self._rest.sampling,
            max_tokens=request.max_tokens,
            stop_token_ids=request.stop_token_ids,
            task=request.task,
            output_token_ids=tuple(self._token_ids),
            priority=request.priority,
            tenant=request.tenant,
            # A deadline is for the first step, which one that has tokens has behind it.
            deadline_s=None if self._token_ids else request.deadline_s,
            cache_salt=request.cache_salt,
        )

    def accept(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        assert not self.finished, f"sequence {self.sequence_id} had ended"
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)

    def send(self, progress: Progress) -> None:
        num_new = progress.num_tokens - self._rest.num_tokens_sent
        assert num_new >= 0 and progress.num_chars >= self._rest.num_chars_sent, "taken back"
        assert progress.num_tokens <= len(self._token_ids), "sent before it was accepted"
        del self._logprobs[:num_new]
        self._rest = msgspec.structs.replace(
            self._rest, num_chars_sent=progress.num_chars, num_tokens_sent=progress.num_tokens
        )

    def finish(self, end: Finished) -> None:
        if end.num_tokens is not None:
            num_unsent = end.num_tokens - self._rest.num_tokens_sent
            assert num_unsent >= 0 and end.num_tokens <= len(self._token_ids)
            del self._token_ids[end.num_tokens :], self._logprobs[num_unsent:]
        self._rest = msgspec.structs.replace(
            self._rest, finish_reason=end.finish_reason, stop_reason=end.stop_reason
        )


@dataclass(frozen=True)
class _Request:
    """What was asked, without choices, and the choices."""

    admitted: Admitted
    choices: tuple[_Choice, ...]

    def record(self) -> Admitted:
        choices = tuple(choice.record() for choice in self.choices)
        return msgspec.structs.replace(self.admitted, choices=choices)
