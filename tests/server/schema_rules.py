"""What schemathesis is told beside the API's document: what the model is, and further rules."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData
from tests.support.server import DENSE

from spanwise.server.limits import MAX_CHOICES

# A request that fits the document may be refused for these reasons, and for no other.
RULES = [
    # of the model that is served
    r"is not in the vocabulary; use ids 0 to \d+",
    r"the prompt has (more than )?\d+ tokens, but ",
    r"the prompt has no tokens",
    r"min_tokens is \d+, but the model's context is ",
    # of two fields together; said in the document they would make unions of whole records
    r"stream_options needs stream",
    r"n is more than 1 but temperature is 0",
    r"top_logprobs needs (logprobs|include)",
    r"prompt_logprobs cannot be streamed",
    r"max_tokens may be 0 only with echo",
    r"max_tokens and max_completion_tokens say different things",
    r"min_tokens is \d+, more than max_tokens ",
    r"best_of (is \d+, less than n|greater than n)",
    r"prompts times n must be",
    r"continue_final_message and add_generation_prompt cannot both",
    r"(tools|chat_template|chat_template_kwargs|add_generation_prompt|continue_final_message) "
    r"needs messages",
    r"response_format and structured_outputs both constrain",
    r"tool_choice and another constraint both say",
    r"tool_choice (needs tools|names )",
    r"tools\[\d+\]\.function\.name .* is that of tools",
    # of languages of their own: JSON Schema, regular expressions, Lark, Jinja
    r"tools\[\d+\]\.function\.parameters",
    r"the (JSON schema|regular expression|grammar) cannot be used: ",
    r"the JSON schema (must be a JSON object|is not JSON)",
    r"the chat template (refuses the messages: |makes \d+ characters)",
]
_RULES = re.compile("|".join(RULES))
_GOOD_KEY = re.compile(r"[!-~]([ -~]{0,200}[!-~])?")
_MANY = range(3, MAX_CHOICES + 1)
_numbers = count()


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Say the model's name, or else nearly every request is about one that does not exist."""
    for record in raw_schema["components"]["schemas"].values():
        if record.get("additionalProperties") is False and "model" in record["properties"]:
            names = [DENSE] if "model" in record.get("required", ()) else [DENSE, None]
            record["properties"]["model"] = {"enum": names}
    (name,) = raw_schema["paths"]["/v1/models/{model}"]["get"]["parameters"]
    name["schema"]["enum"] = [DENSE]


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Change what is right to what is right too, and gets further or takes less time."""
    key = case.headers.get("Idempotency-Key")
    if isinstance(key, str) and _GOOD_KEY.fullmatch(key):
        # Or else nearly every request is refused for having the key of another one.
        case.headers["Idempotency-Key"] = f"{key}{next(_numbers)}"
    if isinstance(case.body, dict):
        # 64 choices take as long as thirty requests, and show no more of what is written.
        few = {name: 2 for name in ("n", "best_of") if case.body.get(name) in _MANY}
        case.body.update(few)


@schemathesis.hook
def filter_failure(context: Any, failure: Exception, case: Any, response: Any) -> bool:
    """Whether a failure is one."""
    if not (isinstance(failure, RejectedPositiveData) and response.status_code == 400):
        return True
    return _RULES.search(response.json()["error"]["message"]) is None
