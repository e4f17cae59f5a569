"""``/v1/completions``: what a request may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from spanwise.server.errors import bad_request
from spanwise.server.limits import MAX_CHOICES, MAX_INT32, MAX_LOGPROBS
from spanwise.server.protocol.constraint import ConstraintFields
from spanwise.server.protocol.prompts import Prompts
from spanwise.server.protocol.sampling import ChoicesFields, RequestFields, StreamFields
from spanwise.server.protocol.strict import Strict, Unsupported

_DEFAULT_MAX_TOKENS = 16


class CompletionRequest(ConstraintFields, ChoicesFields, StreamFields, RequestFields, Strict):
    """The body of a completion request, in the names of the OpenAI API and of vLLM."""

    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0, le=MAX_INT32)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    suffix: Annotated[object, Unsupported("")] = None
    request_id: Annotated[object, Unsupported(advice="send the header x-request-id")] = None

    @property
    def length(self) -> int:
        """How many tokens may be drawn."""
        return _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        self.check_stream()
        self.check_choices()
        if self.length == 0 and not self.echo:
            raise bad_request(
                "max_tokens may be 0 only with echo; ask for at least 1", "max_tokens"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs cannot be streamed", "prompt_logprobs")
        self._check_best_of()

    def _check_best_of(self) -> None:
        wanted = self.n or 1
        if self.best_of is None or self.best_of == wanted:
            return
        if self.best_of < wanted:
            raise bad_request(f"best_of is {self.best_of}, less than n {wanted}", "best_of")
        raise bad_request(
            "best_of greater than n is not supported; leave it out",
            "best_of",
            "unsupported_parameter",
        )
