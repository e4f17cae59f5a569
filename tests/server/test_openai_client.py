"""The official client against every route it knows: it must notice no difference."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.server.fakes import EOS, MODEL, Script
from tests.server.running import Running, running

from spanwise.errors import EngineError, OverloadedError
from spanwise.server.options import ServerOptions
from spanwise.types.serving import EngineRequest

USER = [{"role": "user", "content": "Say hello."}]
HERMES = (
    "{%- if tools %}{{- '<tools>' + (tools | tojson) + '</tools> answer with <tool_call>\\n"
    '{"name": ..., "arguments": ...}\\n</tool_call>\' }}{%- endif %}'
    "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\\n' }}"
    "{%- for call in m['tool_calls'] or [] %}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{%- endfor %}"
    "{%- endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FLAT_WEATHER = {"type": "function", **WEATHER["function"]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(chat_template=HERMES)) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    server.engine.requests.clear()
    with server.openai() as client:
        yield client
    assert not server.engine.live
    server.engine.script, server.engine.refusal = lambda request: None, None
    server.engine.fails_after = -1


def says(text: str | Sequence[int]) -> Script:
    return lambda request: text


def last(server: Running) -> EngineRequest:
    return server.engine.requests[-1]


# --- chat


def test_chat(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says("Hello, world.")
    answer = client.chat.completions.create(model=MODEL, messages=USER)
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world.")
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert choice.message.tool_calls is None and choice.message.refusal is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert last(server).params.max_tokens is None


def test_chat_stream(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says("Grüße an die Welt 😀 und alle.")
    stream = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Grüße an die Welt 😀 und alle."
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 8


def test_chat_stream_usage(server: Running, client: openai.OpenAI) -> None:
    server.engine.num_cached = 3
    create = client.chat.completions.create
    try:
        chunks = list(
            create(
                model=MODEL,
                messages=USER,
                stream=True,
                max_tokens=4,
                stream_options={"include_usage": True},
            )
        )
    finally:
        server.engine.num_cached = 0
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.completion_tokens == 4 and usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        create(model=MODEL, messages=USER, stream=True, max_tokens=4, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 4


def test_chat_choices(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, "n": 3, "max_tokens": 6, "seed": 7}
    whole = client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and whole.usage.completion_tokens == 18
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    again = client.chat.completions.create(**{**ask, "seed": 8})
    assert [choice.message.content for choice in again.choices] != texts


def test_chat_logprobs(server: Running, client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": USER,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    server.engine.script = says("naïve 😀")
    whole = client.chat.completions.create(**ask).choices[0]
    content = whole.logprobs.content
    spelled = b"".join(bytes(each.bytes) for each in content)
    assert spelled.startswith("naïve 😀".encode())
    assert all(len(each.top_logprobs) == 2 for each in content)
    assert any(each.token.startswith("bytes:\\x") for each in content)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [each for part in parts for each in part] == content
    none = client.chat.completions.create(**{**ask, "top_logprobs": 0}).choices[0]
    assert all(each.top_logprobs == [] for each in none.logprobs.content)


def test_chat_passes_every_sampling_field_on(server: Running, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=USER,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=-3,
        stop=["abc", "\n\n"],
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={"17": -100},
        n=1,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        modalities=["text"],
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
            "priority": -4,
            "cache_salt": "sa1t_",
        },
    )
    request = last(server)
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (5, 0.5, 0.9, -3)
    assert params.stop == ["abc", "\n\n"] and params.logit_bias == {17: -100.0}
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.25)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.5)
    assert (params.ignore_eos, params.min_tokens, params.stop_token_ids) == (True, 2, [9])
    assert params.skip_special_tokens is False
    assert (request.priority, request.cache_salt, request.tenant) == (-4, "sa1t_", "")


def test_stop_strings_end_an_answer(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says("one two three four")
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, stop=[" three"], stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text == "one two"


class City(BaseModel):
    name: str
    people: int


def test_parsed_json_schema(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says('{"name": "Oslo", "people": 700000}')
    answer = client.chat.completions.parse(model=MODEL, messages=USER, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Oslo", people=700000)
    grammar = last(server).params.grammar
    assert grammar.kind == "json_schema"
    assert set(json.loads(grammar.text)["properties"]) == {"name", "people"}
    with client.chat.completions.stream(model=MODEL, messages=USER, response_format=City) as stream:
        for _ in stream:
            continue
        assert stream.get_final_completion().choices[0].message.parsed == City(
            name="Oslo", people=700000
        )


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_object", "value": {"type": "array"}}},
            "json_schema",
            '{"type":"array"}',
        ),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"json": {"type": "array"}}}, "json_schema", '{"type":"array"}'),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"choice": ["a.b", "c|d"]}}, "regex", r"a\.b|c\|d"),
    ],
)
def test_constraints(
    server: Running, client: openai.OpenAI, asked: dict[str, Any], kind: str, text: str
) -> None:
    client.chat.completions.create(model=MODEL, messages=USER, max_tokens=2, extra_body=asked)
    grammar = last(server).params.grammar
    assert (grammar.kind, grammar.text) == (kind, text)
    client.completions.create(model=MODEL, prompt="x", max_tokens=2, extra_body=asked)
    assert last(server).params.grammar == grammar


# --- tools


def test_tools_auto(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(f"Let me see. {CALL}")
    answer = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert "Let me see." in choice.message.content
    assert last(server).prompt["tools"][0]["function"]["name"] == "get_weather"
    assert last(server).params.grammar is None
    server.engine.script = says("It rains.")
    answer = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == "It rains."


def test_tools_stream(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(f"{CALL}\n{CALL.replace('Oslo', 'Rome')}")
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], stream=True)
    )
    first = chunks[0].choices[0].delta
    assert first.role == "assistant" and first.content is None
    arguments, names, ids = ["", ""], ["", ""], ["", ""]
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            arguments[call.index] += call.function.arguments or ""
            names[call.index] += call.function.name or ""
            ids[call.index] += call.id or ""
    assert [json.loads(each) for each in arguments] == [{"city": "Oslo"}, {"city": "Rome"}]
    assert names == ["get_weather", "get_weather"] and len(set(ids)) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=MODEL, messages=USER, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    assert len(final.choices[0].message.tool_calls) == 2


def test_tools_forced(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(CALL)
    create = client.chat.completions.create
    answer = create(model=MODEL, messages=USER, tools=[WEATHER], tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert last(server).params.grammar.kind == "lark"
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = create(model=MODEL, messages=USER, tools=[WEATHER], tool_choice=named)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    assert last(server).params.grammar.kind == "lark"


def test_tools_none(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(CALL)
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == CALL
    assert "tools" not in last(server).prompt


def test_one_call_only(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(f"{CALL}\n{CALL}\n{CALL}")
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], parallel_tool_calls=False, stream=stream
        )
        if stream:
            chunks = list(answer)
            starts = [c for c in chunks if (c.choices[0].delta.tool_calls or [None])[0]]
            assert {call.choices[0].delta.tool_calls[0].index for call in starts} == {0}
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            assert len(answer.choices[0].message.tool_calls) == 1
            assert answer.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_goes_on(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(CALL)
    message = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
    said = message.choices[0].message
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, *_texts("brief")]},
        *USER,
        said.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "rain"},
    ]
    server.engine.script = says("It rains.")
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    seen = last(server).prompt["messages"]
    assert seen[0] == {"role": "system", "content": "Be\nbrief"}
    assert seen[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert seen[3]["tool_call_id"] == said.tool_calls[0].id


def _texts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


# --- completions


def test_completions(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="def main(")
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.logprobs is None and choice.text
    assert answer.usage.completion_tokens == 16
    stream = client.completions.create(model=MODEL, prompt="def main(", stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completions_of_many_prompts(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "n": 2, "seed": 1}
    texts = client.completions.create(prompt=["a", "b c"], **ask)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=p, **ask).choices for p in ("a", "b c")]
    assert [c.text for c in texts.choices] == [c.text for each in alone for c in each]
    streamed = [""] * 4
    for chunk in client.completions.create(prompt=["a", "b c"], stream=True, **ask):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in texts.choices]
    tokens = client.completions.create(prompt=[[1, 300, 301], [1, 302]], **ask)
    assert len(tokens.choices) == 4 and tokens.usage.prompt_tokens == 5
    one = client.completions.create(prompt=[1, 300, 301], **ask)
    assert [c.text for c in one.choices] == [c.text for c in tokens.choices[:2]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_scores_the_prompt(client: openai.OpenAI, stream: bool, max_tokens: int) -> None:
    """As lm-eval asks: the log probability of every token of a given text."""
    answer = client.completions.create(
        model=MODEL,
        prompt=[1, 300, 301, 302],
        echo=True,
        logprobs=1,
        max_tokens=max_tokens,
        stream=stream,
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        logprobs = [x for part in parts for x in part.token_logprobs]
        tokens = [x for part in parts for x in part.tokens]
        offsets = [x for part in parts for x in part.text_offset]
        best = [x for part in parts for x in part.top_logprobs]
    else:
        text, found = answer.choices[0].text, answer.choices[0].logprobs
        logprobs, tokens, offsets = found.token_logprobs, found.tokens, found.text_offset
        best = found.top_logprobs
        assert answer.usage.completion_tokens == max_tokens
    assert len(logprobs) == len(tokens) == len(offsets) == len(best) == 4 + max_tokens
    assert logprobs[0] is None and best[0] is None and None not in logprobs[1:]
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        assert text[offset:].startswith(token)
    assert all(token in top for token, top in zip(tokens[1:], best[1:], strict=True))
    assert "".join(tokens[1:]) == text


def test_echo_of_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="def main(", echo=True, max_tokens=3)
    assert answer.choices[0].text.startswith("def main(")
    for chunk in client.completions.create(
        model=MODEL, prompt="def main(", echo=True, max_tokens=3, n=2, stream=True
    ):
        first = chunk.choices[0]
        break
    assert first.text.startswith("def main(")


def test_token_ids_are_returned_when_asked_for(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    answer: Any = client.completions.create(
        model=MODEL, prompt=[1, 300, 301], max_tokens=2, extra_body=extra
    )
    (choice,) = answer.choices
    assert choice.prompt_token_ids == [1, 300, 301] and len(choice.token_ids) == 2
    assert choice.prompt_logprobs[0] is None
    place = choice.prompt_logprobs[2]["301"]
    assert (place["logprob"], place["rank"]) == (-2.5, 3) and place["decoded_token"]
    chat: Any = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=2, extra_body=extra
    )
    assert len(chat.choices[0].token_ids) == 2 and len(chat.prompt_token_ids) > 3
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids)


# --- responses


def test_response(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says("Hello, world.")
    answer = client.responses.create(
        model=MODEL, instructions="Be kind.", input="hi", metadata={"a": "b"}
    )
    assert answer.status == "completed" and answer.output_text == "Hello, world."
    assert answer.metadata == {"a": "b"} and answer.object == "response"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert last(server).prompt["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
    ]


def test_response_stream(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says("Hello, world.")
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        "Hello, world."
    )
    assert events[-1].response.output_text == "Hello, world."
    assert {e.response.id for e in events if hasattr(e, "response")} == {events[0].response.id}
    with client.responses.stream(model=MODEL, input="hi") as stream:
        assert stream.get_final_response().output_text == "Hello, world."


def test_response_that_is_cut_off(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, end = client.responses.create(model=MODEL, input="hi", max_output_tokens=3, stream=True)
    assert end.type == "response.incomplete"


def test_response_with_tools(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says(f"Let me see. {CALL}")
    answer = client.responses.create(model=MODEL, input="hi", tools=[FLAT_WEATHER])
    message, call = answer.output
    assert message.type == "message" and call.type == "function_call"
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Oslo"}
    events = list(
        client.responses.create(model=MODEL, input="hi", tools=[FLAT_WEATHER], stream=True)
    )
    kinds = [event.type for event in events]
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    server.engine.script = says("It rains.")
    answer = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "hi"},
            *(item.model_dump(exclude_none=True) for item in answer.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ],
        tools=[FLAT_WEATHER],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    seen = last(server).prompt["messages"]
    assert [each["role"] for each in seen] == ["user", "assistant", "tool"]
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert last(server).params.grammar.kind == "lark"


def test_parsed_response(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says('{"name": "Oslo", "people": 700000}')
    answer = client.responses.parse(model=MODEL, input="hi", text_format=City)
    assert answer.output_parsed == City(name="Oslo", people=700000)
    assert last(server).params.grammar.kind == "json_schema"


def test_response_logprobs(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "input": "hi",
        "max_output_tokens": 5,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    found = client.responses.create(**ask).output[0].content[0].logprobs
    assert len(found) == 5 and all(len(each.top_logprobs) == 2 for each in found)
    events = list(client.responses.create(**ask, stream=True))
    done = next(e for e in events if e.type == "response.output_text.done")
    assert [each.token for each in done.logprobs] == [each.token for each in found]


# --- embeddings


def test_embeddings(server: Running, client: openai.OpenAI) -> None:
    many = client.embeddings.create(model=MODEL, input=["hi", "there", "you"])
    assert [each.index for each in many.data] == [0, 1, 2]
    plain = client.embeddings.create(model=MODEL, input="hi", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(many.data[0].embedding, rel=1e-6)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1.0)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == 2
    tokens = client.embeddings.create(model=MODEL, input=[1, 3703])
    assert tokens.data[0].embedding == pytest.approx(many.data[0].embedding, rel=1e-6)
    assert last(server).task == "pool_last"
    extra = {"pooling": "mean", "normalize": False}
    raw = client.embeddings.create(
        model=MODEL, input=[[1, 3703]], encoding_format="float", extra_body=extra
    )
    assert raw.data[0].embedding == [3703.0, 1852.0, 2.0] and last(server).task == "pool_mean"
    with server.client() as plainly:
        packed = plainly.post(
            "/v1/embeddings", json={"model": MODEL, "input": "hi", "encoding_format": "base64"}
        )
    octets = base64.b64decode(packed.json()["data"][0]["embedding"])
    assert struct.unpack("<3f", octets) == pytest.approx(plain.data[0].embedding, rel=1e-6)


def test_more_embeddings_than_are_made_at_once(server: Running, client: openai.OpenAI) -> None:
    many = client.embeddings.create(model=MODEL, input=[[1, 300 + i] for i in range(150)])
    alone = client.embeddings.create(model=MODEL, input=[1, 449])
    assert many.data[149].embedding == alone.data[0].embedding


# --- models and errors


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.owned_by == "spanwise"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own(server: Running, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=MODEL, messages=USER, temperature=7)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        create(model=MODEL, messages=[{"role": "user", "content": "x " * 400}])
    assert long.value.code == "context_length_exceeded"
    server.engine.refusal = OverloadedError("the queue is full", 2.3)
    with pytest.raises(openai.InternalServerError) as full:
        create(model=MODEL, messages=USER)
    assert full.value.status_code == 503 and full.value.type == "overloaded_error"
    assert full.value.response.headers["retry-after"] == "3"
    server.engine.refusal = OverloadedError("you have enough", 2.3, True)
    with pytest.raises(openai.RateLimitError) as limited:
        create(model=MODEL, messages=USER)
    assert limited.value.response.headers["retry-after"] == "3"
    server.engine.refusal = EngineError("worker at /dev/shm/x died")
    with pytest.raises(openai.InternalServerError) as failed:
        create(model=MODEL, messages=USER)
    assert failed.value.status_code == 500 and "/dev" not in str(failed.value)


def test_a_failure_within_a_stream(server: Running, client: openai.OpenAI) -> None:
    server.engine.fails_after = 2
    calls: list[Any] = [
        lambda: client.chat.completions.create(model=MODEL, messages=USER, stream=True),
        lambda: client.completions.create(model=MODEL, prompt="a", stream=True),
        lambda: client.completions.create(model=MODEL, prompt=["a", "b"], stream=True),
        lambda: client.responses.create(model=MODEL, input="hi", stream=True),
    ]
    for call in calls:
        seen = 0
        with pytest.raises(openai.APIError) as caught:
            for _ in call():
                seen += 1
        assert seen >= 1 and caught.value.type == "server_error"
        assert "/dev" not in str(caught.value)
    for call in calls[:1]:
        server.engine.fails_after = 0
        with pytest.raises(openai.InternalServerError):  # before the first event: a status
            list(call())


def test_the_end_token_is_no_text(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = says([300, EOS])
    answer = client.chat.completions.create(model=MODEL, messages=USER)
    assert "<|im_end|>" not in answer.choices[0].message.content
