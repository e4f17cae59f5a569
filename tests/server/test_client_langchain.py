"""LangChain's OpenAI classes against the real server, in an environment of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.clients.reference import embedding, greedy, token_ids
from tests.server.clients.running import example_says, python_of, said_by, serving_clients
from tests.support.server import RealServer

pytestmark = pytest.mark.full

MESSAGES = [{"role": "user", "content": "Write a function."}]
NUM_TOKENS = 12
TEXTS = ["def main():", "import os"]


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    python_of("langchain")  # before the server starts: pip takes its time
    with serving_clients() as running:
        yield running


@pytest.fixture(scope="module")
def said(server: RealServer) -> dict[str, Any]:
    return said_by("langchain", server)


def test_chat(said: dict[str, Any]) -> None:
    right = {"text": greedy(MESSAGES, NUM_TOKENS), "num_tokens": NUM_TOKENS}
    for way in ("chat", "streamed chat", "asynchronous chat", "responses"):
        assert said[way] == right, way
    assert said["batch"] == [right["text"]] * 2


def test_log_probabilities(said: dict[str, Any]) -> None:
    tokens = said["log probabilities"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == said["chat"]["text"]
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in tokens)


@pytest.mark.parametrize("way", ["tools", "tools by responses"])
def test_tools(said: dict[str, Any], way: str) -> None:
    ((name, arguments),) = said[way]["calls"]
    assert name == "Ask" and arguments["who"] in ("Ada", "Grace")
    assert said[way]["streamed"] == said[way]["calls"]
    assert said[way]["final"]


def test_a_model_that_never_heard_of_tools(said: dict[str, Any]) -> None:
    error = said["tools left to the model"]
    assert "BadRequestError" in error["is"] and "tool_choice auto" in error["says"]


def test_structured_output(said: dict[str, Any]) -> None:
    answers = [*said["structured"].values(), said["structured responses"]]
    assert len(answers) == 3 and {*answers} <= {"Ada", "Grace"}


def test_completions(said: dict[str, Any]) -> None:
    right = [greedy(prompt, NUM_TOKENS) for prompt in ("def main(", "import os\n")]
    texts = said["completions"]
    assert texts["whole"] == texts["streamed"] == right[0]
    assert texts["many"] == right and texts["usage"]["completion_tokens"] == 2 * NUM_TOKENS


def test_embeddings(said: dict[str, Any]) -> None:
    for text, vector in zip(TEXTS, said["embeddings"]["of texts"], strict=True):
        assert vector == pytest.approx(embedding(token_ids(text)), abs=1e-4)
    for text, vector in zip(TEXTS, said["embeddings"]["of tokens"], strict=True):
        assert vector == pytest.approx(embedding([*text.encode()]), abs=1e-4)


def test_errors(said: dict[str, Any]) -> None:
    assert "BadRequestError" in said["bad"]["is"] and "temperature" in said["bad"]["says"]


def test_the_example_in_the_docs(server: RealServer) -> None:
    assert example_says("langchain-openai", server, python_of("langchain")).strip()
