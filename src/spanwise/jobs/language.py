"""A language model as a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from spanwise.engine.llm import LLM
from spanwise.engine.prompt import Prompt
from spanwise.errors import InputError, SpanwiseError, reason
from spanwise.jobs import answers
from spanwise.jobs.identity import item_seed
from spanwise.jobs.item import Item, heading
from spanwise.jobs.requests import BatchRequest, read_custom_id, read_request
from spanwise.jobs.task import Finished, Record
from spanwise.types.outputs import RequestOutput
from spanwise.types.sampling import SamplingParams

# Requests in flight for each that is computed: the next are at hand when some end.
_QUEUED = 2


class RequestLLM(LLM):
    """An ``LLM`` whose requests are added one by one, and end in any order."""

    def add(self, prompt: Prompt, params: SamplingParams) -> int:
        """Admit a request and give its id. Raises InputError."""
        self._require_open()
        return self._add(0, 1, prompt, params)

    def finished(self) -> list[RequestOutput]:
        """Compute a step; the requests that ended with it."""
        return [request.output() for request in self._step() if request.finished]

    @property
    def num_seats(self) -> int:
        """How many sequences all replicas together compute at once."""
        return self._started.scheduling.max_num_seqs * len(self._started.replicas)


class LanguageTask(ABC):
    """What both kinds of items of a language model have in common."""

    def __init__(
        self, llm: RequestLLM, model: str, sampling: Mapping[str, Any], identity: Mapping[str, str]
    ) -> None:
        """``sampling``: fields of SamplingParams for items that leave them out."""
        self._llm, self._model = llm, model
        self._sampling, self._identity = sampling, identity
        self._wanted: dict[int, tuple[Item, Any]] = {}

    @property
    def capacity(self) -> int:
        """See ``Task``."""
        return _QUEUED * self._llm.num_seats

    def finished(self) -> list[Finished]:
        """See ``Task``."""
        return [self._finished(output) for output in self._llm.finished()]

    def _finished(self, output: RequestOutput) -> Finished:
        item, wanted = self._wanted.pop(output.request_id)
        return Finished(item.index, self._record(item, wanted, output))

    def _add(self, item: Item, wanted: Any, prompt: Prompt, params: SamplingParams) -> None:
        self._wanted[self._llm.add(prompt, params)] = (item, wanted)

    @abstractmethod
    def prepare(self, item: Item) -> Any:
        """See ``Task``."""

    @abstractmethod
    def start(self, item: Item, prepared: Any) -> None:
        """See ``Task``."""

    @abstractmethod
    def error_record(self, item: Item, error: SpanwiseError) -> Record:
        """See ``Task``."""

    @abstractmethod
    def _record(self, item: Item, wanted: Any, output: RequestOutput) -> Record:
        """The record of an item that was answered."""


class RequestsTask(LanguageTask):
    """Lines of an OpenAI batch file."""

    def prepare(self, item: Item) -> BatchRequest:
        """See ``Task``."""
        return read_request(item.content, self._sampling, item_seed(self._identity, item.index))

    def start(self, item: Item, prepared: BatchRequest) -> None:
        """See ``Task``."""
        self._add(item, prepared, prepared.prompt, prepared.params)

    def error_record(self, item: Item, error: SpanwiseError) -> Record:
        """See ``Task``."""
        return answers.error_record(item.index, item.name, read_custom_id(item.content), error)

    def _record(self, item: Item, wanted: BatchRequest, output: RequestOutput) -> Record:
        return answers.answer_record(item.index, wanted.custom_id, wanted.url, self._model, output)


class PromptsTask(LanguageTask):
    """A column of prompts."""

    def prepare(self, item: Item) -> str:
        """See ``Task``."""
        value = item.content[0]
        if not isinstance(value, str):
            raise InputError(f"a prompt must be a text, got {value!r:.80}")
        return value

    def start(self, item: Item, prepared: str) -> None:
        """See ``Task``."""
        seeded = {"seed": item_seed(self._identity, item.index), **self._sampling}
        self._add(item, prepared, {"prompt": prepared}, SamplingParams(**seeded))

    def error_record(self, item: Item, error: SpanwiseError) -> Record:
        """See ``Task``."""
        return {**heading(item), "error": reason(error)}

    def _record(self, item: Item, wanted: str, output: RequestOutput) -> Record:
        outputs = [
            {"text": choice.text, "finish_reason": choice.finish_reason}
            for choice in output.outputs
        ]
        return {**heading(item), "prompt": wanted, "outputs": outputs}
