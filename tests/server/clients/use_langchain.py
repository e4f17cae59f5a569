"""What LangChain makes of a server: one JSON object, each answer under the name of its question."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import reduce
from operator import add
from typing import Any, Literal

import tiktoken
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import OpenAIError
from pydantic import BaseModel

URL, MODEL = sys.argv[1], sys.argv[2]
SERVER: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL}
NUM_TOKENS = 12
ASKED = [HumanMessage("Write a function.")]


class Ask(BaseModel):
    """Ask somebody."""

    who: Literal["Ada", "Grace"]


def main() -> None:
    """Ask everything."""
    chat = ChatOpenAI(**SERVER, temperature=0, max_tokens=NUM_TOKENS, stream_usage=True)
    long = ChatOpenAI(**SERVER, temperature=0, max_tokens=200)
    by_responses = ChatOpenAI(**SERVER, temperature=0, max_tokens=200, use_responses_api=True)
    said = {
        "chat": message(chat.invoke(ASKED)),
        "streamed chat": message(reduce(add, chat.stream(ASKED))),
        "asynchronous chat": message(asyncio.run(chat.ainvoke(ASKED))),
        "batch": [each.content for each in chat.batch([ASKED, ASKED])],
        "log probabilities": chat.bind(logprobs=True, top_logprobs=2)
        .invoke(ASKED)
        .response_metadata["logprobs"]["content"],
        "tools": tools(long),
        "tools left to the model": error(lambda: long.bind_tools([Ask]).invoke(ASKED)),
        "structured": {
            method: long.with_structured_output(Ask, method=method).invoke(ASKED).who
            for method in ("json_schema", "function_calling")
        },
        "responses": message(
            ChatOpenAI(
                **SERVER, temperature=0, max_tokens=NUM_TOKENS, use_responses_api=True
            ).invoke(ASKED)
        ),
        "structured responses": by_responses.with_structured_output(Ask).invoke(ASKED).who,
        "tools by responses": tools(by_responses),
        "completions": completions(),
        "embeddings": embeddings(),
        "bad": error(lambda: chat.bind(temperature=7).invoke(ASKED)),
    }
    print(json.dumps(said))


def message(answer: BaseMessage) -> dict[str, Any]:
    """What an answer says, and how much it took."""
    assert isinstance(answer, AIMessage) and answer.usage_metadata is not None
    return {"text": answer.text, "num_tokens": answer.usage_metadata["output_tokens"]}


def tools(model: ChatOpenAI) -> dict[str, Any]:
    """A call, whole and streamed, and the conversation that goes on with its result."""
    forced = model.bind_tools([Ask], tool_choice="Ask")
    answer = forced.invoke(ASKED)
    streamed = reduce(add, forced.stream(ASKED))
    (call,) = answer.tool_calls
    result = ToolMessage("She is not here.", tool_call_id=call["id"])
    final = model.bind(max_tokens=NUM_TOKENS).invoke([*ASKED, answer, result])
    return {
        "calls": [[each["name"], each["args"]] for each in answer.tool_calls],
        "streamed": [[each["name"], each["args"]] for each in streamed.tool_calls],
        "final": final.text,
    }


def completions() -> dict[str, Any]:
    """Texts, several prompts at once too."""
    model = OpenAI(**SERVER, temperature=0, max_tokens=NUM_TOKENS)
    many = model.generate(["def main(", "import os\n"])
    return {
        "whole": model.invoke("def main("),
        "streamed": "".join(model.stream("def main(")),
        "many": [choices[0].text for choices in many.generations],
        "usage": many.llm_output["token_usage"],
    }


def embeddings() -> dict[str, Any]:
    """Vectors of texts, and of the tokens that the client makes of them unless told not to."""
    plain = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False)
    # The client's own tokens need a download; these are the bytes.
    octets = {bytes([number]): number for number in range(256)}
    tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
        "cl100k_base", pat_str=r"[\s\S]", mergeable_ranks=octets, special_tokens={}
    )
    return {
        "of texts": plain.embed_documents(["def main():", "import os"]),
        "of tokens": OpenAIEmbeddings(**SERVER).embed_documents(["def main():", "import os"]),
    }


def error(work: Any) -> dict[str, Any]:
    """The error that a call ends with."""
    try:
        return {"answer": repr(work())}
    except OpenAIError as caught:
        return {"is": [each.__name__ for each in type(caught).__mro__], "says": str(caught)}


if __name__ == "__main__":
    main()
