"""The official client against the real server: by every way to it the text of transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from tests.server.clients.reference import embedding, greedy, logprobs, token_ids
from tests.server.clients.running import example_says, serving_clients
from tests.support.server import DENSE, PATIENCE_S, RealServer, until

PROMPT = "def main("
MESSAGES = [{"role": "user", "content": "Write a function."}]
NUM_TOKENS = 12
GREEDY: dict[str, Any] = {"model": DENSE, "temperature": 0, "max_tokens": NUM_TOKENS}
CHAT = GREEDY | {"messages": MESSAGES}
COMPLETION = GREEDY | {"prompt": PROMPT}
RESPONSE: dict[str, Any] = {
    "model": DENSE,
    "temperature": 0,
    "max_output_tokens": NUM_TOKENS,
    "input": MESSAGES,
}
WITHOUT_LIMIT = ("max_tokens", "max_output_tokens")
TOLERANCE = 1e-3


class Verdict(BaseModel):
    """Every answer that fits it is short, so that a small model comes to an end."""

    kind: Literal["function", "class"]
    num_lines: int = Field(ge=0, le=99)


class Ask(BaseModel):
    """Ask somebody."""

    who: Literal["Ada", "Grace"]


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with serving_clients() as running:
        yield running


@pytest.fixture(scope="module")
def settings(server: RealServer) -> dict[str, Any]:
    """What both clients are told."""
    url = f"{server.url}/v1"
    return {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}


@pytest.fixture(scope="module")
def client(settings: dict[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**settings) as client:
        yield client


@pytest.fixture
def run(settings: dict[str, Any]) -> Callable[..., Any]:
    """Runs ``work(client)`` with the asynchronous client."""

    def run(work: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
        async def with_client() -> Any:
            async with openai.AsyncOpenAI(**settings) as client:
                return await work(client)

        return asyncio.run(with_client())

    return run


def free(asked: dict[str, Any]) -> dict[str, Any]:
    """The same, as long as it likes."""
    return {name: value for name, value in asked.items() if name not in WITHOUT_LIMIT}


# --- the same text by every way


def test_chat(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    expected = greedy(MESSAGES, NUM_TOKENS)
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == NUM_TOKENS
    streamed = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = streamed
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens

    async def work(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(**CHAT)
        streamed = await client.chat.completions.create(**CHAT, stream=True)
        return whole, [chunk async for chunk in streamed]

    whole, chunks = run(work)
    assert whole.choices[0].message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_completions(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    expected = greedy(PROMPT, NUM_TOKENS)
    whole = client.completions.create(**COMPLETION)
    assert whole.choices[0].text == expected
    by_ids = client.completions.create(**COMPLETION | {"prompt": token_ids(PROMPT)})
    assert by_ids.choices[0].text == expected
    assert by_ids.usage.total_tokens == whole.usage.total_tokens
    streamed = client.completions.create(**COMPLETION, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected

    async def work(client: openai.AsyncOpenAI) -> str:
        streamed = await client.completions.create(**COMPLETION, stream=True)
        return "".join([chunk.choices[0].text async for chunk in streamed])

    assert run(work) == expected


def test_responses(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    expected = greedy(MESSAGES, NUM_TOKENS)
    whole = client.responses.create(**RESPONSE)
    assert whole.output_text == expected and whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**RESPONSE, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    with client.responses.stream(**RESPONSE) as stream:
        (end,) = [event for event in stream if event.type == "response.incomplete"]
    assert end.response.output_text == expected

    async def work(client: openai.AsyncOpenAI) -> tuple[str, str]:
        whole = await client.responses.create(**RESPONSE)
        streamed = await client.responses.create(**RESPONSE, stream=True)
        deltas = [e.delta async for e in streamed if e.type == "response.output_text.delta"]
        return whole.output_text, "".join(deltas)

    assert run(work) == (expected, expected)


def test_many_at_once_get_what_each_gets_alone(run: Callable[..., Any]) -> None:
    prompts = ["def main(", "import os\n", "class Node:\n", "for i in range("]

    async def work(client: openai.AsyncOpenAI) -> list[str]:
        asked = [client.completions.create(**COMPLETION | {"prompt": each}) for each in prompts * 2]
        return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert run(work) == [greedy(prompt, NUM_TOKENS) for prompt in prompts] * 2


def test_choices_with_a_seed(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    asked = {"model": DENSE, "messages": MESSAGES, "n": 3, "seed": 11, "max_completion_tokens": 8}
    texts = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    assert len(set(texts)) == 3

    async def work(client: openai.AsyncOpenAI) -> ChatCompletion:
        return await client.chat.completions.create(**asked)

    assert [choice.message.content for choice in run(work).choices] == texts


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    expected = greedy(PROMPT, NUM_TOKENS)
    stop = expected[3:6]
    answer = client.completions.create(**COMPLETION, stop=[stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (expected.split(stop)[0], "stop")


# --- numbers


def test_scores_of_prompts_are_those_of_transformers(client: openai.OpenAI) -> None:
    prompts = [token_ids("import os\nimport sys"), token_ids("class Node:")]
    asked = {"model": DENSE, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = client.completions.create(**asked)
    for choice, ids in zip(answer.choices, prompts, strict=True):
        assert choice.logprobs is not None
        first, *scores = choice.logprobs.token_logprobs
        assert first is None and scores == pytest.approx(logprobs(ids), abs=TOLERANCE)


def test_scores_of_an_answer_are_those_of_transformers(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        **COMPLETION, logprobs=2, extra_body={"return_token_ids": True}
    ).choices[0]
    prompt, ids = token_ids(PROMPT), answer.token_ids
    right = logprobs(prompt + ids)[len(prompt) - 1 :]
    assert answer.logprobs.token_logprobs == pytest.approx(right, abs=TOLERANCE)
    chat = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0]
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob


def test_embeddings(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    texts = ["def main():", "import os"]
    packed = client.embeddings.create(model=DENSE, input=texts)  # in base64, unless asked
    plain = client.embeddings.create(model=DENSE, input=texts, encoding_format="float")
    by_ids = client.embeddings.create(model=DENSE, input=[token_ids(text) for text in texts])
    for place, text in enumerate(texts):
        right = pytest.approx(embedding(token_ids(text)), abs=1e-4)
        for answer in (packed, plain, by_ids):
            assert answer.data[place].embedding == right

    async def work(client: openai.AsyncOpenAI) -> list[float]:
        answer = await client.embeddings.create(model=DENSE, input=texts[0])
        return answer.data[0].embedding

    assert run(work) == pytest.approx(packed.data[0].embedding, abs=1e-6)


# --- parsed


def test_parsed_answers(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    chat, response = free(CHAT), free(RESPONSE)
    right = client.chat.completions.parse(**chat, response_format=Verdict).choices[0].message.parsed
    assert isinstance(right, Verdict)
    with client.responses.stream(**response, text_format=Verdict) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_parsed == right
    assert kinds >= {"response.output_text.delta", "response.output_text.done"}

    async def work(client: openai.AsyncOpenAI) -> list[Any]:
        responded = await client.responses.parse(**response, text_format=Verdict)
        async with client.chat.completions.stream(**chat, response_format=Verdict) as stream:
            chatted = await stream.get_final_completion()
        return [responded.output_parsed, chatted.choices[0].message.parsed]

    assert run(work) == [right, right]


def test_parsed_calls_in_chat(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    asked = free(CHAT) | {
        "tools": [pydantic_function_tool(Ask)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    choice = client.chat.completions.parse(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Ask)

    async def work(client: openai.AsyncOpenAI) -> tuple[set[str], Any]:
        async with client.chat.completions.stream(**asked) as stream:
            kinds = {event.type async for event in stream}
            return kinds, await stream.get_final_completion()

    kinds, streamed = run(work)
    assert "tool_calls.function.arguments.done" in kinds
    (again,) = streamed.choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "She is not here."}
    told = [*MESSAGES, choice.message, result]
    answer = client.chat.completions.create(**CHAT | {"messages": told})
    assert answer.choices[0].message.content


def test_parsed_calls_in_responses(client: openai.OpenAI) -> None:
    asked = free(RESPONSE) | {
        "tools": [pydantic_function_tool(Ask)["function"] | {"type": "function"}],
        "tool_choice": {"type": "function", "name": "Ask"},
    }
    answer = client.responses.parse(**asked)
    (call,) = answer.output
    assert call.type == "function_call" and answer.status == "completed"
    Ask.model_validate_json(call.arguments)
    events = list(client.responses.create(**asked, stream=True))
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Not here."}
    told = [*MESSAGES, *answer.output, result]
    assert client.responses.create(**RESPONSE | {"input": told}).output_text


# --- leaving, and errors


def test_a_stream_that_is_left_is_ended(server: RealServer, client: openai.OpenAI) -> None:
    endless = COMPLETION | {"max_tokens": 1900}
    with client.completions.create(
        **endless, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        assert not server.is_idle()
    assert until(server.is_idle)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DENSE]
    assert client.models.retrieve(DENSE).owned_by == "spanwise"


def test_errors_are_the_clients_own(client: openai.OpenAI, run: Callable[..., Any]) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**CHAT | {"temperature": 7})
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(**COMPLETION | {"prompt": [7] * 3000})
    assert long.value.code == "context_length_exceeded"

    async def work(client: openai.AsyncOpenAI) -> None:
        await client.chat.completions.create(**CHAT | {"model": "gpt-4"})

    with pytest.raises(openai.NotFoundError) as missing:
        run(work)
    assert missing.value.code == "model_not_found"


def test_the_example_in_the_docs(server: RealServer) -> None:
    assert example_says("openai", server).strip()
