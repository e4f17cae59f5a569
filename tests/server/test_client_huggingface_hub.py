"""huggingface_hub's InferenceClient against the real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from tests.server.clients.reference import greedy
from tests.server.clients.running import example_says, serving_clients
from tests.support.server import DENSE, PATIENCE_S, RealServer

MESSAGES = [{"role": "user", "content": "Write a function."}]
NUM_TOKENS = 12
CHAT: dict[str, Any] = {
    "model": DENSE,
    "messages": MESSAGES,
    "temperature": 0,
    "max_tokens": NUM_TOKENS,
}
# Every object that fits is short, so that a small model comes to an end.
SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["Ada", "Grace"]}},
    "required": ["who"],
    "additionalProperties": False,
}
ASK = {"type": "function", "function": {"name": "ask", "parameters": SCHEMA}}


@pytest.fixture(autouse=True)
def not_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests forbid this library the network, and it takes a port of this machine for that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with serving_clients() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RealServer) -> InferenceClient:
    return InferenceClient(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_S)


def test_chat(client: InferenceClient) -> None:
    answer = client.chat_completion(**CHAT, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == greedy(MESSAGES, NUM_TOKENS)
    assert choice.finish_reason == "length" and choice.logprobs is not None
    assert len(choice.logprobs.content) == NUM_TOKENS
    assert answer.usage.completion_tokens == NUM_TOKENS


def test_chat_in_the_words_of_openai(server: RealServer) -> None:
    client = InferenceClient(base_url=server.url, api_key="none", timeout=PATIENCE_S)
    *chunks, last = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == greedy(
        MESSAGES, NUM_TOKENS
    )
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == NUM_TOKENS


def test_asynchronous_chat(server: RealServer) -> None:
    async def work() -> tuple[str, str]:
        async with AsyncInferenceClient(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.chat_completion(**CHAT)
            streamed = await client.chat_completion(**CHAT, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in streamed]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(work()) == (greedy(MESSAGES, NUM_TOKENS),) * 2


def test_response_format(client: InferenceClient) -> None:
    """The client says a schema in a way of its own: ``json_object`` with a ``value``."""
    wanted = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
    asked = CHAT | {"max_tokens": 200, "response_format": wanted}
    choice = client.chat_completion(**asked).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content)["who"] in ("Ada", "Grace")
    streamed = client.chat_completion(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == choice.message.content
    broken = {"type": "json_object", "value": {"type": "thing"}}
    with pytest.raises(BadRequestError, match="thing"):
        client.chat_completion(**CHAT, response_format=broken)


def test_tools(client: InferenceClient) -> None:
    forced = {"type": "function", "function": {"name": "ask"}}
    asked = CHAT | {"max_tokens": 200, "tools": [ASK], "tool_choice": forced}
    choice = client.chat_completion(**asked).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "ask")
    assert json.loads(call.function.arguments)["who"] in ("Ada", "Grace")
    deltas = [chunk.choices[0].delta for chunk in client.chat_completion(**asked, stream=True)]
    first, *rest = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert first.function.name == "ask" and first.id
    assert "".join(piece.function.arguments for piece in rest) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "She is not here."}
    told = [*MESSAGES, choice.message, result]
    assert client.chat_completion(**CHAT | {"messages": told}).choices[0].message.content


def test_errors_say_what_is_wrong(client: InferenceClient) -> None:
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat_completion(**CHAT | {"temperature": 7})
    with pytest.raises(HfHubHTTPError, match="'gpt-4' does not exist") as missing:
        client.chat_completion(**CHAT | {"model": "gpt-4"})
    assert missing.value.response.status_code == 404


def test_the_example_in_the_docs(server: RealServer) -> None:
    assert example_says("huggingface_hub", server).strip()
