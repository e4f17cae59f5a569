"""The LM Evaluation Harness against the real server, in an environment of its own, without torch.

It asks for scores with ``echo``, ``logprobs`` and token ids, several prompts at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.clients.reference import greedy, likeliest, logprobs, token_ids
from tests.server.clients.running import command_says, python_of, said_by, serving_clients
from tests.support.server import RealServer

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).resolve().parent / "clients" / "lm_eval_tasks" / "examples.jsonl"
NUM_TOKENS = 12
TOLERANCE = 1e-3
BEGIN = 1  # the token that texts begin with

each_way = pytest.mark.parametrize("way", ["one by one", "in batches", "at once"])


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    python_of("lm_eval")  # before the server starts: pip takes its time
    with serving_clients() as running:
        yield running


@pytest.fixture(scope="module")
def said(server: RealServer) -> dict[str, Any]:
    return said_by("lm_eval", server)


@pytest.fixture(scope="module")
def examples() -> list[dict[str, str]]:
    return [json.loads(line) for line in EXAMPLES.read_text().splitlines()]


def scored(context: str, target: str) -> list[Any]:
    """The log probability of a target after a context, and whether it is the likeliest one."""
    stripped = context.rstrip()
    target = context[len(stripped) :] + target
    first = len(token_ids(stripped, special=False))
    ids = token_ids(stripped + target, special=False)
    return [
        pytest.approx(sum(logprobs(ids)[first - 1 :]), abs=TOLERANCE),
        likeliest(ids)[first - 1 :] == ids[first:],
    ]


@each_way
def test_scores(said: dict[str, Any], examples: list[dict[str, str]], way: str) -> None:
    right = [[scored(each["context"], each["target"])] for each in examples]
    assert {is_likeliest for ((_, is_likeliest),) in right} == {True, False}
    assert said[way]["score"] == right


@each_way
def test_choices(said: dict[str, Any], examples: list[dict[str, str]], way: str) -> None:
    right = [
        [scored(each["context"], each[name]) for name in ("target", "other")] for each in examples
    ]
    assert said[way]["choose"] == right


@each_way
def test_scores_of_whole_texts(
    said: dict[str, Any], examples: list[dict[str, str]], way: str
) -> None:
    whole = [token_ids(each["context"] + each["target"], special=False) for each in examples]
    right = [[pytest.approx(sum(logprobs([BEGIN, *ids])), abs=TOLERANCE)] for ids in whole]
    assert said[way]["rolling"] == right


@each_way
def test_texts(said: dict[str, Any], examples: list[dict[str, str]], way: str) -> None:
    texts = [greedy(each["context"], NUM_TOKENS, special=False) for each in examples]
    assert said[way]["write"] == [[text.split(":")[0]] for text in texts]


def test_chats(said: dict[str, Any], examples: list[dict[str, str]]) -> None:
    asked = [[{"role": "user", "content": each["context"]}] for each in examples]
    texts = [greedy(messages, NUM_TOKENS) for messages in asked]
    assert said["chat"]["write"] == [[text.split(":")[0]] for text in texts]


def test_it_needs_no_torch(said: dict[str, Any]) -> None:
    assert said["has torch"] is False


def test_the_example_in_the_docs(server: RealServer) -> None:
    table = command_says("lm-eval", server, python_of("lm_eval"))
    assert "|score" in table and "acc" in table
