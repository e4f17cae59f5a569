"""From what a caller asks of sampling to what workers are told: every value resolved."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from spanwise.errors import InputError, ModelError
from spanwise.types.sampling import SamplingParams, SamplingSpec


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """A model's own defaults, from its ``generation_config.json``."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_defaults(generation: Mapping[str, Any], config: Mapping[str, Any]) -> SamplingDefaults:
    """Read the defaults; the EOS ids come from the config where the generation config has none."""
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    given = {
        name: generation[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if generation.get(name) is not None
    }
    try:
        SamplingParams(stop_token_ids=_ids(eos), **given)
    except InputError as error:
        raise ModelError(f"generation_config.json: {error}; mend that file") from error
    return SamplingDefaults(eos_token_ids=_ids(eos), **given)


def _ids(eos: Any) -> tuple[Any, ...]:
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def resolve_sampling(
    params: SamplingParams, defaults: SamplingDefaults, vocab_size: int
) -> list[SamplingSpec]:
    """One spec for each choice. A request without a seed gets one here, once."""
    _check_ids(params, vocab_size)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    stops = _wanted_stops(params, defaults)

    def pick(name: str) -> Any:
        given = getattr(params, name)
        return getattr(defaults, name) if given is None else given

    return [
        SamplingSpec(
            temperature=float(pick("temperature")),
            top_p=float(pick("top_p")),
            top_k=max(0, pick("top_k")),
            min_p=float(pick("min_p")),
            seed=seed,
            choice=choice,
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(pick("repetition_penalty")),
            logit_bias={int(k): float(v) for k, v in (params.logit_bias or {}).items()},
            min_tokens=params.min_tokens,
            stop_token_ids=tuple(i for i in stops if i < vocab_size),
            logprobs=_count(params.logprobs, vocab_size),
            prompt_logprobs=_count(params.prompt_logprobs, vocab_size),
            grammar=params.grammar,
        )
        for choice in range(params.n)
    ]


def stop_token_ids(params: SamplingParams, defaults: SamplingDefaults) -> tuple[int, ...]:
    """Tokens that end a choice when drawn: the caller's, and EOS unless it is to be ignored.

    With a grammar EOS is drawn only where the answer is complete and nothing else may follow, so
    there it always ends the choice.
    """
    eos = defaults.eos_token_ids if params.grammar is not None else ()
    return tuple(dict.fromkeys((*_wanted_stops(params, defaults), *eos)))


def _wanted_stops(params: SamplingParams, defaults: SamplingDefaults) -> tuple[int, ...]:
    eos = () if params.ignore_eos else defaults.eos_token_ids
    return tuple(dict.fromkeys((*(params.stop_token_ids or ()), *eos)))


def _count(wanted: int | None, vocab_size: int) -> int:
    """Logprobs to report: -1 means none inside, but all of the vocabulary to a caller."""
    if wanted is None:
        return -1
    return vocab_size if wanted == -1 else min(wanted, vocab_size)


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids or ()),
        ("logit_bias", params.logit_bias or {}),
    ):
        for token_id in ids:
            if token_id >= vocab_size:
                raise InputError(
                    f"{name}: token id {token_id} is not in the vocabulary; "
                    f"use ids 0 to {vocab_size - 1}"
                )
