"""What requests for text have in common: how it is sampled, and when it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from spanwise.server.errors import bad_request
from spanwise.server.limits import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_INT32,
    MAX_INT64,
    MAX_SALT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from spanwise.server.protocol.forms import LIST, TEXT, text_or_list
from spanwise.server.protocol.strict import Count, Name, Natural, Strict, TokenId, Unsupported

_TOKEN_ID = "^(0|[1-9][0-9]{0,9})$"

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
Stop = Annotated[
    Annotated[StopString, Tag(TEXT)] | Annotated[StopStrings, Tag(LIST)],
    text_or_list("Input should be a string or a list of strings"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)]
# One that names no path and holds no control character, however it is stored.
Salt = Annotated[str, StringConstraints(pattern=rf"^[A-Za-z0-9._~+=-]{{1,{MAX_SALT_CHARACTERS}}}$")]


def _biases(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"Object should have at most {MAX_BIASES} fields")
    for key in value:
        if not (isinstance(key, str) and re.fullmatch(_TOKEN_ID, key)):
            raise PydanticCustomError("token_id", 'Keys should be token ids, like "50256"')
    return value


Biases = Annotated[
    dict[str, Bias],
    BeforeValidator(_biases),
    Field(
        description="Token ids, as text, and what is added to their logits.",
        json_schema_extra={"propertyNames": {"pattern": _TOKEN_ID}, "maxProperties": MAX_BIASES},
    ),
]


class SamplingFields(Strict):
    """How tokens are drawn, in the names of the OpenAI API and of vLLM."""

    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_INT32)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: Biases | None = None

    stop: Stop | None = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Field(fail_fast=True, max_length=MAX_STOP_TOKENS)
    ] = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    # -- known elsewhere, and not here
    use_beam_search: Annotated[object, Unsupported(False)] = None
    length_penalty: Annotated[object, Unsupported(1)] = None
    include_stop_str_in_output: Annotated[object, Unsupported(False)] = None
    spaces_between_special_tokens: Annotated[object, Unsupported(True)] = None
    truncate_prompt_tokens: Annotated[object, Unsupported()] = None
    allowed_token_ids: Annotated[object, Unsupported()] = None
    bad_words: Annotated[object, Unsupported()] = None
    logprob_token_ids: Annotated[object, Unsupported()] = None
    logits_processors: Annotated[object, Unsupported()] = None
    prompt_embeds: Annotated[object, Unsupported()] = None
    kv_transfer_params: Annotated[object, Unsupported()] = None
    vllm_xargs: Annotated[object, Unsupported()] = None

    def sampled(self) -> dict[str, Any]:
        """The fields of SamplingParams that are given here."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
        if self.logit_bias is not None:
            given["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        return {name: value for name, value in given.items() if value is not None}


class ChoicesFields(SamplingFields):
    """How tokens are drawn, for several choices."""

    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None

    def check_choices(self) -> None:
        """Raise ApiError for choices that would be equal."""
        if (self.n or 1) > 1 and self.temperature == 0:
            raise bad_request(
                "n is more than 1 but temperature is 0, which would give equal choices; "
                "set one of them otherwise",
                "n",
            )


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[object, Unsupported(False)] = None


class RequestFields(Strict):
    """What every request may say of itself, of no effect on the answer but for ``cache_salt``."""

    model: str
    user: Name | None = None
    priority: Annotated[int | None, Field(ge=-MAX_INT32 - 1, le=MAX_INT32)] = None
    cache_salt: Salt | None = None


class StreamFields(Strict):
    """Whether the answer comes in pieces."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_every_usage(self) -> bool:
        """Whether every chunk says the usage so far."""
        options = self.stream_options
        return options is not None and self.includes_usage and bool(options.continuous_usage_stats)

    def check_stream(self) -> None:
        """Raise ApiError for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream; set it to true", "stream_options")


ServiceTier = Literal["auto", "default"]
MaxTokens = Count
