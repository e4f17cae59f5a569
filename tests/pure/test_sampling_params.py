from __future__ import annotations

import math
from typing import Any

import pytest

from spanwise.engine.sampling_defaults import (
    SamplingDefaults,
    read_defaults,
    resolve_sampling,
    stop_token_ids,
)
from spanwise.errors import InputError, ModelError
from spanwise.types.sampling import SamplingParams

BAD: list[dict[str, Any]] = [
    {"n": 0}, {"n": 65}, {"n": 1.0}, {"n": True},
    {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
    {"temperature": "1"}, {"top_p": 0.0}, {"top_p": 1.0001}, {"top_k": -2}, {"min_p": 1.5},
    {"seed": 2**63}, {"seed": 1.5}, {"max_tokens": 0}, {"max_tokens": -3}, {"max_tokens": 1.5},
    {"min_tokens": -1}, {"min_tokens": 5, "max_tokens": 4}, {"presence_penalty": 3.0},
    {"frequency_penalty": math.nan}, {"repetition_penalty": 0.0}, {"logprobs": -2},
    {"prompt_logprobs": -2}, {"stop": ""}, {"stop": [""]}, {"stop": [3]},
    {"stop_token_ids": [-1]}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: 101.0}},
    {"logit_bias": {1: math.nan}},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_a_value_out_of_range_is_named_in_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**fields)
    assert "\n" not in str(error.value)
    assert any(name in str(error.value) for name in fields)


def test_the_models_own_values_fill_what_was_left_open() -> None:
    defaults = read_defaults(
        {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "do_sample": True}, {}
    )
    (spec,) = resolve_sampling(SamplingParams(top_k=5, seed=1), defaults, 100)
    assert (spec.temperature, spec.top_k, spec.top_p) == (0.6, 5, 1.0)
    assert spec.stop_token_ids == (7, 9)


def test_eos_of_the_config_counts_where_the_generation_config_has_none() -> None:
    assert read_defaults({}, {"eos_token_id": 4}).eos_token_ids == (4,)
    assert read_defaults({}, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": "hot"},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"eos_token_id": 2.0},
        {"eos_token_id": [1, "x"]},
    ],
    ids=str,
)
def test_a_default_that_cannot_be_is_the_models_fault(generation: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_defaults(generation, {})


def test_ignore_eos_keeps_the_callers_stop_tokens() -> None:
    defaults = SamplingDefaults(eos_token_ids=(7,))
    params = SamplingParams(ignore_eos=True, stop_token_ids=[3])
    assert stop_token_ids(params, defaults) == (3,)
    assert stop_token_ids(SamplingParams(stop_token_ids=[3, 7]), defaults) == (3, 7)


def test_a_seed_is_given_at_admission_and_shared_by_the_choices() -> None:
    first = resolve_sampling(SamplingParams(n=3), SamplingDefaults(), 100)
    again = resolve_sampling(SamplingParams(n=3), SamplingDefaults(), 100)
    assert len({spec.seed for spec in first}) == 1
    assert [spec.choice for spec in first] == [0, 1, 2]
    assert first[0].seed != again[0].seed


@pytest.mark.parametrize("fields", [{"stop_token_ids": [100]}, {"logit_bias": {100: 1.0}}])
def test_ids_beyond_the_vocabulary_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="token id 100 is not in the vocabulary"):
        resolve_sampling(SamplingParams(**fields), SamplingDefaults(), 100)


def test_all_logprobs_means_the_whole_vocabulary() -> None:
    (spec,) = resolve_sampling(
        SamplingParams(logprobs=-1, prompt_logprobs=500), SamplingDefaults(), 100
    )
    assert (spec.logprobs, spec.prompt_logprobs) == (100, 100)
    (spec,) = resolve_sampling(SamplingParams(), SamplingDefaults(), 100)
    assert (spec.logprobs, spec.prompt_logprobs) == (-1, -1)
