"""Conversations and the templates that write them: the model's, the server's, the request's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.server.asgi import Call
from tests.server.fakes import MODEL, FakeEngine

from spanwise.server.app import create_app
from spanwise.server.options import ServerOptions

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
_SAY = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
THINKING = (
    "{% if tools %}{{ tools | tojson }} answer <tool_call>arguments</tool_call>{% endif %}"
    + _SAY
    + "{% if add_generation_prompt and not answer_at_once %}<think>\n{% endif %}"
    + "{# </think> #}"
)
RICH = _SAY + "{{ reasoning_effort }}{{ documents | tojson }}{% if 'developer' %}{% endif %}"


def ask(
    body: dict[str, Any],
    script: Any = None,
    path: str = "/v1/chat/completions",
    **options: Any,
) -> tuple[int, dict[str, Any], str]:
    """The status and body of an answer, and the prompt that the engine was given."""

    async def go() -> tuple[int, dict[str, Any], str]:
        engine = FakeEngine()
        engine.script = lambda request: script
        call = Call(create_app(engine, ServerOptions(**options)), path, {"model": MODEL, **body})
        await call.task
        prompt = ""
        if engine.requests:
            token_ids = await engine.tokenize(engine.requests[0].prompt)
            prompt = engine.tokenizer.decode(token_ids, skip_special_tokens=False)
        return call.status or 0, json.loads(call.text), prompt

    return asyncio.run(go())


def test_the_servers_template_stands_in_for_the_models() -> None:
    _, _, prompt = ask({"messages": [USER]}, "x", chat_template=_SAY)
    assert prompt == "user:hi;"
    _, _, prompt = ask({"input": "hi", "instructions": "so"}, "x", "/v1/responses",
                       chat_template=_SAY)  # fmt: skip
    assert prompt == "system:so;user:hi;"
    _, _, prompt = ask({"messages": [USER]}, "x")
    assert prompt.startswith("<|bos|><|im_start|>user\nhi<|im_end|>")


def test_the_requests_template_is_for_servers_that_trust_it() -> None:
    body = {"messages": [USER], "chat_template": _SAY + "{{ word }}"}
    status, answer, _ = ask(body, "x")
    assert status == 400 and answer["error"]["param"] == "chat_template"
    status, answer, _ = ask({"messages": [USER], "chat_template_kwargs": {"word": "W"}}, "x")
    assert status == 400 and answer["error"]["param"] == "chat_template_kwargs"
    both = {**body, "chat_template_kwargs": {"word": "W"}}
    status, _, prompt = ask(both, "x", trust_request_chat_template=True)
    assert status == 200 and prompt == "user:hi;W"
    for bad in ({"chat_template": "x"}, {"tokenize": False}, {"tools": []}):
        status, _, _ = ask(
            {"messages": [USER], "chat_template_kwargs": bad}, "x", trust_request_chat_template=True
        )
        assert status == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_template_that_refuses_is_the_clients_to_know(path: str) -> None:
    template = "{{ raise_exception('roles must alternate at ' + messages[0].role) }}"
    status, answer, _ = ask({"messages": [USER]}, "x", path, chat_template=template)
    assert status == 400 and "roles must alternate at user" in answer["error"]["message"]


def test_what_a_template_reads_is_passed_to_it() -> None:
    beside = {"reasoning_effort": "low", "documents": [{"text": "d"}]}
    developer = {"role": "developer", "content": "so"}
    _, _, prompt = ask({"messages": [developer, USER], **beside}, "x", chat_template=RICH)
    assert prompt == 'developer:so;user:hi;low[{"text": "d"}]'
    _, _, prompt = ask(
        {"input": "hi", "reasoning": {"effort": "high"}}, "x", "/v1/responses", chat_template=RICH
    )
    assert prompt.startswith("user:hi;high")
    for path, body in (
        ("/v1/chat/completions", {"messages": [USER], "reasoning_effort": "low"}),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": "low"}}),
    ):
        status, answer, _ = ask(body, "x", path, chat_template=_SAY)
        assert status == 400 and "reasoning_effort" in answer["error"]["message"]


@pytest.mark.parametrize("objects", [True, False])
def test_arguments_come_as_the_template_reads_them(objects: bool) -> None:
    how = "(c.function.arguments | tojson)" if objects else "c.function.arguments"
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '=' + HOW }}{% endfor %}"
    template = template.replace("HOW", how) + "{% endfor %}"
    function = {"name": "f", "arguments": '{"a": 1}'}
    said = {"role": "assistant", "tool_calls": [
        {"id": "x", "type": "function", "function": function}
    ]}  # fmt: skip
    _, _, prompt = ask({"messages": [USER, said]}, "x", chat_template=template)
    assert prompt == '={"a": 1}'
    call = {"type": "function_call", "call_id": "x", **function}
    _, _, prompt = ask({"input": [USER, call]}, "x", "/v1/responses", chat_template=template)
    assert prompt == '={"a": 1}'


def test_the_last_message_goes_on() -> None:
    begun = [USER, {"role": "assistant", "content": "Hel"}]
    body = {"messages": begun, "continue_final_message": True}
    _, _, prompt = ask(body, "lo")
    assert prompt.endswith("<|im_start|>assistant\nHel")
    _, _, prompt = ask({"messages": begun, "add_generation_prompt": False}, "x")
    assert prompt.endswith("Hel<|im_end|>\n")


def test_no_call_is_read_within_a_thought() -> None:
    body = {"messages": [USER], "tools": [TOOL]}
    thought = f"Should I {CALL}? Yes.</think>\n"
    _, answer, prompt = ask(body, thought + CALL, chat_template=THINKING)
    assert prompt.endswith("<think>\n")
    message = answer["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1 and message["content"].startswith("Should I <tool_call>")
    # Where the prompt does not end within a thought, what looks like a call is one.
    at_once = {**body, "chat_template_kwargs": {"answer_at_once": True}}
    _, answer, _ = ask(at_once, CALL, chat_template=THINKING, trust_request_chat_template=True)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


def test_a_forced_call_may_be_thought_about() -> None:
    body = {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}
    _, answer, prompt = ask(body, f"Yes.</think>\n{CALL}", chat_template=THINKING)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert prompt.endswith("<think>\n")


def test_special_tokens_of_a_call_are_seen() -> None:
    """Marks of a call may be special tokens, which answers are without otherwise."""

    async def go() -> bool:
        engine = FakeEngine()
        engine.script = lambda request: CALL
        app = create_app(engine, ServerOptions(chat_template=THINKING))
        for body in ({"tools": [TOOL]}, {}):
            await Call(
                app, "/v1/chat/completions", {"model": MODEL, "messages": [USER], **body}
            ).task
        return [r.params.skip_special_tokens for r in engine.requests] == [False, True]

    assert asyncio.run(go())
