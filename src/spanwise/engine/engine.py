"""The loop of a running engine: requests in, outputs out, plans and results in between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from spanwise.control.router import Router
from spanwise.engine.choice import Choice, LiveRequest
from spanwise.engine.detokenizer import Detokenizer
from spanwise.engine.launch import ReplicaHandle
from spanwise.engine.sampling_defaults import SamplingDefaults, resolve_sampling, stop_token_ids
from spanwise.engine.tokenizer import Tokenizer
from spanwise.scheduler.request import SequenceRequest
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.outputs import RequestOutput
from spanwise.types.sampling import SamplingParams
from spanwise.worker.executor import wait_any


class Engine:
    """Feeds every replica and gathers what comes back. For one thread at a time."""

    def __init__(
        self,
        replicas: Sequence[ReplicaHandle],
        tokenizer: Tokenizer,
        defaults: SamplingDefaults,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._replicas, self._tokenizer, self._defaults = replicas, tokenizer, defaults
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._router = Router(len(replicas))
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
        room = self._max_model_len - len(prompt_token_ids)
        expected = len(prompt_token_ids) + min(params.max_tokens or room, max(room, 0))
        for index, spec in enumerate(specs):
            sequence_id = next(self._sequence_ids)
            replica = self._router.assign(sequence_id, expected)
            wanted = SequenceRequest(
                sequence_id=sequence_id,
                prompt_token_ids=request.prompt_token_ids,
                sampling=spec,
                max_tokens=params.max_tokens,
                stop_token_ids=stops,
            )
            try:
                self._replicas[replica].scheduler.add(wanted)
            except BaseException:
                self._router.release(sequence_id)
                self._drop(request)
                raise
            detokenizer = Detokenizer(
                self._tokenizer, params.skip_special_tokens, params.stop_strings, params.min_tokens
            )
            choice = Choice(index, sequence_id, detokenizer)
            request.choices.append(choice)
            self._choice_of[sequence_id] = (request, choice)
        self._live[request.request_id] = request
        return request.request_id

    def abort(self, request_id: int) -> None:
        """End a request early; harmless when it has ended."""
        request = self._live.pop(request_id, None)
        if request is not None:
            self._drop(request)

    def abort_all(self) -> None:
        """End every request early."""
        for request_id in list(self._live):
            self.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Send what can be planned, wait for results, and return the requests that have news."""
        for replica in self._replicas:
            self._feed(replica)
        busy = [r for r in self._replicas if r.scheduler.num_in_flight]
        assert busy or not self._live, "requests are live, but nothing can be planned"
        if len(busy) == 1:
            ready = busy
            results = [(busy[0], result) for result in busy[0].executor.wait()]
        else:
            woken = wait_any([r.executor for r in busy]) if busy else []
            ready = [r for r in busy if r.executor in woken]
            results = [(r, result) for r in ready for result in r.executor.results()]
        news: dict[int, LiveRequest] = {}
        for replica, result in results:
            updates = replica.scheduler.accept(result)
            # The devices work on while text is made of what came.
            self._feed(replica)
            for update in updates:
                request = self._take(replica, update)
                if request is not None:
                    news[request.request_id] = request
        return [self._report(request) for request in news.values()]

    def _feed(self, replica: ReplicaHandle) -> None:
        while (plan := replica.scheduler.next_plan()) is not None:
            replica.executor.submit(plan)

    def _take(self, replica: ReplicaHandle, update: SequenceUpdate) -> LiveRequest | None:
        found = self._choice_of.get(update.sequence_id)
        if found is None:
            return None  # aborted while its last step ran
        request, choice = found
        if choice.index == 0:
            request.prompt_logprobs += update.prompt_logprobs
        if choice.take(update):
            replica.scheduler.stop(choice.sequence_id)
        if choice.finish_reason is not None:
            self._forget(choice.sequence_id)
        return request

    def _report(self, request: LiveRequest) -> RequestOutput:
        if request.finished:
            self._live.pop(request.request_id, None)
        return request.output()

    def _drop(self, request: LiveRequest) -> None:
        for choice in request.choices:
            if choice.finish_reason is None:
                replica = self._router.replica_of(choice.sequence_id)
                self._replicas[replica].scheduler.abort(choice.sequence_id)
                self._forget(choice.sequence_id)

    def _forget(self, sequence_id: int) -> None:
        del self._choice_of[sequence_id]
        self._router.release(sequence_id)
