"""The engine of a script: requests in, requests with news out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count

from spanwise.engine.choice import Choice, LiveRequest, new_choice
from spanwise.engine.core import EngineCore
from spanwise.engine.sampling_defaults import SamplingDefaults, resolve_sampling, stop_token_ids
from spanwise.engine.tokenizer import Tokenizer
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.sampling import SamplingParams


class Engine:
    """Feeds every replica and makes text of what comes back. For one thread at a time."""

    def __init__(
        self,
        core: EngineCore[SequenceRequest],
        tokenizer: Tokenizer,
        defaults: SamplingDefaults,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._core, self._tokenizer, self._defaults = core, tokenizer, defaults
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._live: dict[int, LiveRequest] = {}
        self._choice_of: dict[int, tuple[LiveRequest, Choice]] = {}
        self._request_ids, self._sequence_ids = count(), count()

    @property
    def num_live(self) -> int:
        """Requests admitted and not finished."""
        return len(self._live)

    def add(
        self, prompt: str | None, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> int:
        """Admit a request and return its id. Raises InputError, and then nothing is admitted."""
        specs = resolve_sampling(params, self._defaults, self._vocab_size)
        stops = stop_token_ids(params, self._defaults)
        request = LiveRequest(next(self._request_ids), prompt, tuple(prompt_token_ids), params, [])
        room = max(self._max_model_len - len(prompt_token_ids), 0)
        expected = len(prompt_token_ids) + min(params.max_tokens or room, room)
        for index, spec in enumerate(specs):
            wanted = SequenceRequest(
                sequence_id=next(self._sequence_ids),
                prompt_token_ids=request.prompt_token_ids,
                sampling=spec,
                max_tokens=params.max_tokens,
                stop_token_ids=stops,
            )
            try:
                self._core.add(wanted, expected)
            except BaseException:
                self._drop(request)
                raise
            choice = new_choice(index, wanted.sequence_id, self._tokenizer, params)
            request.choices.append(choice)
            self._choice_of[wanted.sequence_id] = (request, choice)
        self._live[request.request_id] = request
        return request.request_id

    def abort(self, request_id: int) -> None:
        """End a request early; harmless when it has ended."""
        request = self._live.pop(request_id, None)
        if request is not None:
            self._drop(request)

    def step(self) -> list[LiveRequest]:
        """Send what can be planned, wait for results, and return the requests that have news."""
        updates = self._core.feed(time.monotonic()) + self._core.wait()
        assert updates or not self._live or self._core.num_in_flight, "nothing can be planned"
        news: dict[int, LiveRequest] = {}
        for update in updates:
            request = self._take(update)
            if request is not None:
                news[request.request_id] = request
        for request in news.values():
            if request.finished:
                self._live.pop(request.request_id, None)
        return list(news.values())

    def _take(self, update: SequenceUpdate) -> LiveRequest | None:
        found = self._choice_of.get(update.sequence_id)
        if found is None:
            return None  # aborted while its last step ran
        request, choice = found
        if choice.index == 0:
            request.prompt_logprobs += update.prompt_logprobs
        if choice.take(update):
            self._core.end(choice.sequence_id)
        if choice.finish_reason is not None:
            del self._choice_of[choice.sequence_id]
        return request

    def _drop(self, request: LiveRequest) -> None:
        for choice in request.choices:
            if choice.finish_reason is None:
                self._core.end(choice.sequence_id)
                del self._choice_of[choice.sequence_id]
