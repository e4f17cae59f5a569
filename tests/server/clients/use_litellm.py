"""What LiteLLM makes of a server: one JSON object, each answer under the name of its question."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import; else it asks a server

import litellm
from openai import OpenAIError
from pydantic import BaseModel

URL, MODEL = sys.argv[1], sys.argv[2]
SERVER = {"api_base": f"{URL}/v1", "api_key": "none"}
NUM_TOKENS = 16  # of responses it asks for no less, whatever it is told
# Only of models that it knows to stream does it ask for streamed responses.
STREAMS = {
    "litellm_provider": "openai",
    "mode": "responses",
    "supports_native_streaming": True,
}
MESSAGES = [{"role": "user", "content": "Write a function."}]
CHAT: dict[str, Any] = {**SERVER, "messages": MESSAGES, "temperature": 0, "max_tokens": NUM_TOKENS}
ASK = {
    "type": "function",
    "function": {
        "name": "ask",
        "parameters": {
            "type": "object",
            "properties": {"who": {"enum": ["Ada", "Grace"]}},
            "required": ["who"],
            "additionalProperties": False,
        },
    },
}


class Ask(BaseModel):
    """Ask somebody."""

    who: Literal["Ada", "Grace"]


def main() -> None:
    """Ask everything."""
    said = {provider: chat(f"{provider}/{MODEL}") for provider in ("openai", "hosted_vllm")} | {
        "tools": tools(),
        "structured": litellm.completion(
            model=f"openai/{MODEL}", **CHAT | {"max_tokens": 200}, response_format=Ask
        )
        .choices[0]
        .message.content,
        "completions": completions(),
        "embeddings": [
            each["embedding"]
            for each in litellm.embedding(
                model=f"openai/{MODEL}", input=["def main():", "import os"], **SERVER
            ).data
        ],
        "responses": responses(),
        "errors": {
            "bad": error(model=f"openai/{MODEL}", **CHAT | {"temperature": 7}),
            "missing": error(model="openai/gpt-4", **CHAT),
            "long": error(
                model=f"openai/{MODEL}",
                **CHAT | {"messages": [{"role": "user", "content": "word " * 4000}]},
            ),
        },
    }
    print(json.dumps(said))


def chat(model: str) -> dict[str, Any]:
    """A conversation, by every way to it."""
    whole = litellm.completion(model=model, **CHAT)
    usage = {"include_usage": True}
    chunks = list(litellm.completion(model=model, **CHAT, stream=True, stream_options=usage))
    streamed = litellm.stream_chunk_builder(chunks, messages=MESSAGES)

    async def ask() -> Any:
        return await litellm.acompletion(model=model, **CHAT)

    return {
        name: {
            "text": answer.choices[0].message.content,
            "end": answer.choices[0].finish_reason,
            "num_tokens": answer.usage.completion_tokens,
        }
        for name, answer in (
            ("whole", whole),
            ("streamed", streamed),
            ("asynchronous", asyncio.run(ask())),
        )
    }


def tools() -> dict[str, Any]:
    """A call, whole and streamed, and the conversation that goes on with its result."""
    named = {"type": "function", "function": {"name": "ask"}}
    asked = CHAT | {"max_tokens": 200, "tools": [ASK], "tool_choice": named}
    model = f"openai/{MODEL}"
    message = litellm.completion(model=model, **asked).choices[0].message
    streamed = litellm.stream_chunk_builder(
        list(litellm.completion(model=model, **asked, stream=True))
    )
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "She is not here."}
    told = CHAT | {"messages": [*MESSAGES, message, result]}
    return {
        "calls": calls(message),
        "streamed": calls(streamed.choices[0].message),
        "final": litellm.completion(model=model, **told).choices[0].message.content,
    }


def calls(message: Any) -> list[list[Any]]:
    """The names of the functions a message calls, and their arguments."""
    return [
        [call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls
    ]


def completions() -> dict[str, Any]:
    """Texts, several prompts at once too."""
    asked: dict[str, Any] = {
        **SERVER,
        "model": f"text-completion-openai/{MODEL}",
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
    }
    many = litellm.text_completion(prompt=["def main(", "import os\n"], **asked)
    streamed = litellm.text_completion(prompt="def main(", stream=True, **asked)
    return {
        "whole": litellm.text_completion(prompt="def main(", **asked).choices[0].text,
        "streamed": "".join(chunk.choices[0].text or "" for chunk in streamed),
        "many": [choice.text for choice in many.choices],
    }


def responses() -> dict[str, Any]:
    """A response, whole and streamed."""
    litellm.register_model({f"openai/{MODEL}": STREAMS})
    asked: dict[str, Any] = {
        **SERVER,
        "model": f"openai/{MODEL}",
        "input": MESSAGES,
        "temperature": 0,
        "max_output_tokens": NUM_TOKENS,
    }
    whole = litellm.responses(**asked)
    events = list(litellm.responses(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    return {
        "whole": whole.output[0].content[0].text,
        "streamed": "".join(deltas),
        "last": events[-1].type,
    }


def error(**asked: Any) -> dict[str, Any]:
    """The error that a request ends with."""
    try:
        return {"answer": repr(litellm.completion(**asked))}
    except OpenAIError as caught:
        return {"is": [each.__name__ for each in type(caught).__mro__], "says": str(caught)}


if __name__ == "__main__":
    main()
