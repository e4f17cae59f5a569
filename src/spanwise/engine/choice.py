"""One request and its choices while they are being generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from spanwise.engine.detokenizer import Detokenizer
from spanwise.engine.tokenizer import Tokenizer
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.outputs import CompletionOutput, FinishReason, RequestOutput
from spanwise.types.plan import TokenLogprobs
from spanwise.types.sampling import SamplingParams
from spanwise.types.serving import ChoiceDelta


@dataclass
class Choice:
    """One choice: its sequence, its tokens so far and their text."""

    index: int
    sequence_id: int
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _told_tokens: int = 0
    _told_characters: int = 0

    def take(self, update: SequenceUpdate) -> bool:
        """Take news of the sequence; True where a stop string ended it before the scheduler did."""
        # The token that stops a choice stands among its ids, and never in its text.
        drawn_stop = update.finish_reason == "stop" and bool(update.token_ids)
        visible = update.token_ids[:-1] if drawn_stop else update.token_ids
        stopped_by = self.detokenizer.add(visible)
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        if stopped_by is not None:
            # Tokens that came after the stop string in the same news were never wanted.
            num_kept = self.detokenizer.num_tokens
            del self.token_ids[num_kept:], self.logprobs[num_kept:]
            self.finish_reason, self.stop_reason = "stop", stopped_by
            return update.finish_reason is None
        if update.finish_reason is not None:
            self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
            self.detokenizer.finish()
            if self.detokenizer.stopped_by is not None:
                self.finish_reason, self.stop_reason = "stop", self.detokenizer.stopped_by
        return False

    def delta(self) -> ChoiceDelta:
        """What is new since the last delta."""
        first, begin = self._told_tokens, self._told_characters
        end = self.detokenizer.num_settled
        self._told_tokens, self._told_characters = len(self.token_ids), end
        return ChoiceDelta(
            index=self.index,
            text=self.detokenizer.text[begin:end],
            token_ids=tuple(self.token_ids[first:]),
            logprobs=tuple(self.logprobs[first:]),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def output(self, wants_logprobs: bool) -> CompletionOutput:
        """The choice as it stands."""
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs) if wants_logprobs else None,
        )


def new_choice(
    index: int, sequence_id: int, tokenizer: Tokenizer, params: SamplingParams
) -> Choice:
    """A choice that has no token yet."""
    return Choice(
        index,
        sequence_id,
        Detokenizer(tokenizer, params.skip_special_tokens, params.stop_strings, params.min_tokens),
    )


@dataclass
class LiveRequest:
    """A request that has been admitted."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    _told_prompt_logprobs: int = 0

    def new_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """Those that have come since the last call; none where none were asked for."""
        if self.params.prompt_logprobs is None:
            return ()
        first, self._told_prompt_logprobs = self._told_prompt_logprobs, len(self.prompt_logprobs)
        return tuple(self.prompt_logprobs[first:])

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        scored = self.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(c.output(self.params.logprobs is not None) for c in self.choices),
            prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
            finished=self.finished,
        )
