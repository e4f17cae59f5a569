"""Lines of OpenAI's batch output. The same request always gives the same bytes."""

from __future__ import annotations

from typing import Any

from spanwise.errors import ContextLengthError, SpanwiseError, reason
from spanwise.jobs.requests import CHAT
from spanwise.types.outputs import CompletionOutput, RequestOutput

# An answer is the same whenever it is made: it does not say when that was.
_CREATED = 0


def answer_record(
    index: int, custom_id: str, url: str, model: str, output: RequestOutput
) -> dict[str, Any]:
    """The line of a request that was answered."""
    chat = url == CHAT
    num_prompt = len(output.prompt_token_ids)
    num_completion = sum(len(choice.token_ids) for choice in output.outputs)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{index}",
        "object": "chat.completion" if chat else "text_completion",
        "created": _CREATED,
        "model": model,
        "choices": [_chat(each) if chat else _completion(each) for each in output.outputs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }
    response = {"status_code": 200, "request_id": f"req-{index}", "body": body}
    return {
        "id": f"batch_req_{index}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


def error_record(
    index: int, name: str, custom_id: str | None, error: SpanwiseError
) -> dict[str, Any]:
    """The line of a request that could not be answered."""
    too_long = isinstance(error, ContextLengthError)
    return {
        "id": f"batch_req_{index}",
        "custom_id": custom_id,
        "response": None,
        "error": {
            "code": "context_length_exceeded" if too_long else "invalid_request",
            "message": f"{name}: {reason(error)}",
        },
    }


def _chat(choice: CompletionOutput) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return {
        "index": choice.index,
        "message": message,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
    }


def _completion(choice: CompletionOutput) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
    }
