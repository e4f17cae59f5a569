"""Whole answers, and that nothing but the grammar and the model decides them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cpu.grammar.spelling import regex, spellings
from tests.support.driver import drive, give_few_blocks, tokens_of
from tests.support.replica import MAX_LEN, Replica
from tests.support.tokenizers import EOS, NUM_TOKENS, byte_level

from spanwise import LLM, SamplingParams
from spanwise.runner import grammar as matching
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.plan import StepPlan, StepResult
from spanwise.types.sampling import Grammar, SamplingSpec


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("spanwise/tiny-dense", dtype="float32", max_model_len=512) as llm:
        yield llm


SHAPES = [
    "(ab|cd|[x-z]){3,6}(12|-[0-9]{2})",
    '\\{"a":(1|12|[3-9]{2,9})\\}',
    "[a-f]{4}( [a-f]{2,4}){1,3}\\.",
]
NUM_OUTPUT = 24


def constrained() -> list[SequenceRequest]:
    """Sequences of which every fourth is free; greedy ones and others."""
    specs = [
        SamplingSpec(
            temperature=float(index % 2),
            seed=index,
            stop_token_ids=(EOS,),
            logprobs=0,
            grammar=regex(SHAPES[index % 4]) if index % 4 < 3 else None,
        )
        for index in range(12)
    ]
    return [
        SequenceRequest(
            sequence_id=index,
            prompt_token_ids=tuple(range(9, 12 + index)),
            sampling=spec,
            max_tokens=NUM_OUTPUT,
            stop_token_ids=(EOS,),
        )
        for index, spec in enumerate(specs)
    ]


@pytest.fixture(scope="module")
def alone(llama: Path) -> dict[int, list[int]]:
    """What each of them gives by itself."""
    found = {}
    for request in constrained():
        updates = drive(Replica(llama), [request])
        found[request.sequence_id] = tokens_of(updates[request.sequence_id])
    return found


def answers(replica: Replica, **options: Any) -> dict[int, list[int]]:
    updates = drive(replica, constrained(), **options)
    return {index: tokens_of(found) for index, found in updates.items()}


def test_answers_match_and_end(alone: dict[int, list[int]]) -> None:
    pieces = spellings(byte_level())
    for index, tokens in alone.items():
        if index % 4 == 3:
            assert len(tokens) == NUM_OUTPUT and max(tokens) >= NUM_TOKENS  # the free ones stray
            continue
        assert tokens[-1] == EOS and EOS not in tokens[:-1]
        text = "".join(pieces[token] for token in tokens[:-1])
        assert re.fullmatch(SHAPES[index % 4], text), text
    assert len({tuple(tokens) for tokens in alone.values()}) > 8


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_neither_neighbours_nor_the_layout_change_an_answer(
    pp: int, tp: int, llama: Path, alone: dict[int, list[int]]
) -> None:
    assert answers(Replica(llama, pp=pp, tp=tp, max_step_tokens=16)) == alone


def watched(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sequence is introduced with an answer that has begun."""
    introduced: Counter[int] = Counter()
    execute = replica._execute

    def counting(plans: Sequence[StepPlan]) -> list[StepResult]:
        for plan in plans:
            for new in plan.lanes[0].new:
                introduced[new.sequence_id] += len(new.token_ids) > new.num_prompt
        return execute(plans)

    monkeypatch.setattr(replica, "_execute", counting)
    return introduced


def test_a_preempted_answer_goes_on_as_it_would_have(
    llama: Path, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(llama, max_step_tokens=16)
    give_few_blocks(replica, 14)
    introduced = watched(replica, monkeypatch)
    assert answers(replica) == alone
    assert sum(introduced[index] > 0 for index in alone if index % 4 < 3) >= 3, introduced


@pytest.mark.parametrize("pp", [1, 2])
def test_another_epoch_goes_on_as_the_last_one_would_have(
    pp: int, llama: Path, alone: dict[int, list[int]]
) -> None:
    replica = Replica(llama, pp=pp)

    def lose_everything(round_: int) -> None:
        if round_ in (4, 9):
            replica.scheduler.restart(round_)

    assert answers(replica, between=lose_everything) == alone


def test_an_answer_resumed_elsewhere_goes_on(llama: Path, alone: dict[int, list[int]]) -> None:
    halves = {
        request.sequence_id: alone[request.sequence_id][: 3 + request.sequence_id % 4]
        for request in constrained()
    }
    resumed = [
        msgspec.structs.replace(request, output_token_ids=tuple(halves[request.sequence_id]))
        for request in constrained()
    ]
    updates = drive(Replica(llama), resumed)
    assert {index: halves[index] + tokens_of(updates[index]) for index in alone} == alone


def test_ids_used_again_begin_a_new_answer(llama: Path) -> None:
    """A dropped sequence leaves nothing of its grammar to one of the same id in another epoch."""
    replica = Replica(llama)
    first = constrained()[0]
    drive(replica, [first])
    replica.scheduler.restart(1)
    other = SamplingSpec(stop_token_ids=(EOS,), grammar=regex("[0-9]{3}"))
    changed = msgspec.structs.replace(first, sampling=other)
    tokens = tokens_of(drive(replica, [changed])[0])
    assert re.fullmatch("[0-9]{3}", byte_level().decode(tokens))


def test_an_ignored_end_comes_only_when_nothing_else_can(llama: Path) -> None:
    spec = SamplingSpec(grammar=regex("[a-c]{2,5}"))
    request = SequenceRequest(sequence_id=0, prompt_token_ids=(9, 10), sampling=spec, max_tokens=8)
    tokens = tokens_of(drive(Replica(llama), [request])[0])
    text = byte_level().decode(tokens)
    assert len(tokens) == 8 and re.fullmatch("[a-c]{5}", text)
    first_end = tokens.index(EOS)
    assert tokens[first_end:] == [EOS] * (8 - first_end)


def test_the_tokenizer_is_built_once_and_only_for_a_grammar(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = matching.LLTokenizer
    monkeypatch.setattr(matching, "LLTokenizer", lambda *a, **k: built.append(1) or real(*a, **k))
    matching._load_tokenizer.cache_clear()
    drive(
        Replica(llama, tp=2), [request for request in constrained() if not request.sampling.grammar]
    )
    assert not built
    answers(Replica(llama, tp=2))
    assert len(built) == 1


def test_json_of_a_trained_model(tiny: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    params = SamplingParams(
        n=4, temperature=1.0, seed=3, max_tokens=120,
        grammar=Grammar("json_schema", json.dumps(schema)),
    )  # fmt: skip
    first, second = tiny.generate(["def main(", "def main("], params)
    assert first.outputs == second.outputs
    for choice in first.outputs:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        assert set(value) <= {"name", "count", "tags"}
        assert re.fullmatch("[a-z_]{1,12}", value["name"]) and 1 <= value["count"] <= 99
        assert set(value.get("tags", [])) <= {"x", "y"} and len(value.get("tags", [])) <= 3
    assert len({choice.text for choice in first.outputs}) > 1


def test_long_answers_fit_the_model(llama: Path) -> None:
    """To the very end of the model's length, where no token may follow."""
    spec = SamplingSpec(stop_token_ids=(EOS,), grammar=regex("[ab]{200}"))
    request = SequenceRequest(
        sequence_id=0, prompt_token_ids=(9, 10), sampling=spec, stop_token_ids=(EOS,)
    )
    updates = drive(Replica(llama), [request])[0]
    assert updates[-1].finish_reason == "length"
    assert set(byte_level().decode(tokens_of(updates))) <= {"a", "b"}
    assert len(tokens_of(updates)) == MAX_LEN - 2
