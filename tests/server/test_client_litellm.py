"""LiteLLM against the real server, in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.clients.reference import embedding, greedy, token_ids
from tests.server.clients.running import example_says, python_of, said_by, serving_clients
from tests.support.server import RealServer

pytestmark = pytest.mark.full

MESSAGES = [{"role": "user", "content": "Write a function."}]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    python_of("litellm")  # before the server starts: pip takes its time
    with serving_clients() as running:
        yield running


@pytest.fixture(scope="module")
def said(server: RealServer) -> dict[str, Any]:
    return said_by("litellm", server)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat(said: dict[str, Any], provider: str) -> None:
    text = greedy(MESSAGES, NUM_TOKENS)
    right = {"text": text, "end": "length", "num_tokens": NUM_TOKENS}
    assert said[provider] == dict.fromkeys(("whole", "streamed", "asynchronous"), right)


def test_tools(said: dict[str, Any]) -> None:
    ((name, arguments),) = said["tools"]["calls"]
    assert name == "ask" and arguments["who"] in ("Ada", "Grace")
    assert said["tools"]["streamed"] == said["tools"]["calls"]
    assert said["tools"]["final"]


def test_structured_output(said: dict[str, Any]) -> None:
    assert json.loads(said["structured"])["who"] in ("Ada", "Grace")


def test_completions(said: dict[str, Any]) -> None:
    right = [greedy(prompt, NUM_TOKENS) for prompt in ("def main(", "import os\n")]
    assert said["completions"] == {"whole": right[0], "streamed": right[0], "many": right}


def test_responses(said: dict[str, Any]) -> None:
    right = greedy(MESSAGES, NUM_TOKENS)
    ended = {"whole": right, "streamed": right, "last": "response.incomplete"}
    assert said["responses"] == ended


def test_embeddings(said: dict[str, Any]) -> None:
    for text, vector in zip(["def main():", "import os"], said["embeddings"], strict=True):
        assert vector == pytest.approx(embedding(token_ids(text)), abs=1e-4)


@pytest.mark.parametrize(
    ("case", "kind", "says"),
    [
        ("bad", "BadRequestError", "temperature"),
        ("missing", "NotFoundError", "'gpt-4' does not exist"),
        ("long", "BadRequestError", "max_model_len"),
    ],
)
def test_errors(said: dict[str, Any], case: str, kind: str, says: str) -> None:
    error = said["errors"][case]
    assert kind in error["is"] and says in error["says"]


def test_the_example_in_the_docs(server: RealServer) -> None:
    assert example_says("litellm", server, python_of("litellm")).strip()
