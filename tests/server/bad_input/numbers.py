"""Section 3, rows 27 to 51: fields that are unknown or not supported, and values out of range."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec
from tests.server.bad_input.case import (
    BODIES,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    EMBEDDINGS,
    LONGEST,
    RESPONSES,
    TEXT,
    TOKENIZE,
    USER,
    VOCAB,
    Case,
    changed,
    named,
    short,
)

_INF, _NAN = math.inf, math.nan
_NOT_COUNTS: list[Any] = [-1, 2**31, 2**63, 10**30, 1.5, True, "5", [], {}]
_PENALTIES: list[Any] = [_NAN, _INF, -_INF, 2.1, -2.1, 1e30, "1", True]
_PRIORITIES: list[Any] = [10**30, 2**31, -(2**31) - 1, "1", 1.5, True]
_SALTS: list[Any] = ["", "x" * 1_000_000, "a/b", "a\x00b", "a b", "ä", 5, "a\n", "../x"]
_IDS_OUT_OF_REACH = (str(VOCAB), "-1", "99999999999999999999")
_NO_IDS = ("AI", "1.0", " 5", "05", "٣", "5 ", "+5", "0x5", "")

SAMPLING: dict[str, tuple[int, list[Any]]] = {
    "temperature": (31, [_NAN, _INF, -0.1, 2.1, 1e400, "1", True, [1]]),
    "top_p": (33, [0, 0.0, _NAN, 1.0000001, -1, "1", True]),
    "min_p": (33, [_NAN, -0.1, 1.1, "0"]),
    "top_k": (33, [-2, 1.5, 2**31, True, "5"]),
    "presence_penalty": (35, _PENALTIES),
    "frequency_penalty": (35, _PENALTIES),
    "repetition_penalty": (35, [_NAN, _INF, 0, -1, 1e30, "1"]),
    "seed": (48, [2**64, 2**63, -(2**63) - 1, 1.5, "a", True]),
    "min_tokens": (30, _NOT_COUNTS),
    "stop": (46, ["", [""], ["a", ""], ["a"] * 10_000, "x" * 1_000_000, 5, [5], {"a": 1}, [["a"]]]),
    "stop_token_ids": (46, [[-1], [VOCAB], [2**31], [1.5], [True], ["1"], "1", [1] * 10_000]),
    "ignore_eos": (46, ["true", 1, []]),
    "skip_special_tokens": (46, ["true", 1]),
    "priority": (50, _PRIORITIES),
    "cache_salt": (50, _SALTS),
    "logit_bias": (42, [
        *({key: 1} for key in (*_IDS_OUT_OF_REACH, *_NO_IDS)),
        *({"5": bias} for bias in (101, -100.1, _NAN, _INF, "1", None, True)),
        {str(i): 1 for i in range(2000)}, [], "5",
    ]),
    "user": (50, [5, [], "x" * 1000]),
    "stream": (50, ["true", 1, []]),
}  # fmt: skip

_UNSUPPORTED_EVERYWHERE: dict[str, tuple[int, Any]] = {
    "use_beam_search": (37, True),
    "length_penalty": (37, 2.0),
    "include_stop_str_in_output": (46, True),
    "spaces_between_special_tokens": (51, False),
    "truncate_prompt_tokens": (55, 3),
    "allowed_token_ids": (45, []),
    "bad_words": (47, [""]),
    "logprob_token_ids": (39, [1] * 129),
    "logits_processors": (51, ["os.system"]),
    "prompt_embeds": (62, "gASV"),
    "kv_transfer_params": (40, {}),
    "vllm_xargs": (51, {}),
}
_GUIDED = {"guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a",
           "guided_decoding_backend": "outlines"}  # fmt: skip
_UNSUPPORTED: dict[str, dict[str, tuple[int, Any]]] = {
    CHAT: {
        "audio": (51, {"voice": "x", "format": "wav"}),
        "modalities": (51, ["audio"]),
        "functions": (51, [{"name": "f"}]),
        "function_call": (51, "auto"),
        "web_search_options": (51, {}),
        "moderation": (51, {"model": "x"}),
        "verbosity": (51, "low"),
        "store": (51, True),
        "documents": (51, [{"text": "x"}]),
        "reasoning_effort": (51, "low"),
        "echo": (51, True),
        "mm_processor_kwargs": (63, {}),
        "chat_template": (68, "{{ messages }}"),
        "chat_template_kwargs": (68, {"chat_template": "x", "tokenize": False, "tools": []}),
        "request_id": (51, "x"),
    },
    COMPLETIONS: {"suffix": (51, "x"), "prompt_embeds": (62, "gASV"), "best_of": (37, 4)},
    RESPONSES: {
        "previous_response_id": (51, "resp_x"),
        "conversation": (51, "x"),
        "background": (51, True),
        "store": (51, True),
        "truncation": (51, "auto"),
        "prompt": (51, {"id": "x"}),
        "context_management": (51, []),
    },
    EMBEDDINGS: {"dimensions": (51, 4), "truncate_prompt_tokens": (51, 4)},
}


def _values() -> Iterator[tuple[int, str, str, Any]]:
    """Rows, routes, fields, and values that are out of their range."""
    for path in TEXT:
        for field, (row, values) in SAMPLING.items():
            yield from ((row, path, field, value) for value in values)
        counts = [*_NOT_COUNTS] if path == COMPLETIONS else [0, *_NOT_COUNTS]
        yield from ((27, path, LONGEST[path], value) for value in counts)
    for path in (CHAT, COMPLETIONS):
        yield from ((36, path, "n", value) for value in [0, 65, 10**9, *_NOT_COUNTS])
    for value in [-1, 21, 1.5, "1", True]:
        yield from ((40, path, "prompt_logprobs", value) for path in (CHAT, COMPLETIONS))
        yield 41, COMPLETIONS, "logprobs", value
        yield 41, RESPONSES, "top_logprobs", value
    yield from ((41, COMPLETIONS, "echo", value) for value in ["true", 1])
    yield from ((37, COMPLETIONS, "best_of", value) for value in [0, 10**6, *_NOT_COUNTS])
    yield from ((27, CHAT, "max_completion_tokens", value) for value in [0, *_NOT_COUNTS])
    yield from ((41, CHAT, "logprobs", value) for value in ["true", 1, 5])
    metadata: list[Any] = [{"a": 1}, {"a" * 65: "b"}, "a", [], {"a": "x" * 513}]
    metadata.append({str(i): "x" for i in range(17)})
    yield from ((51, CHAT, "metadata", value) for value in metadata)
    yield from ((51, CHAT, "service_tier", value) for value in ["flex", "priority", "x", 5])
    yield from ((50, EMBEDDINGS, "priority", value) for value in _PRIORITIES)
    yield from ((50, EMBEDDINGS, "cache_salt", value) for value in _SALTS)
    yield from ((51, EMBEDDINGS, "encoding_format", value) for value in ["int8", 5, ""])
    yield from ((51, EMBEDDINGS, "pooling", value) for value in ["max", 5])


def _out_of_range(row: int, path: str, field: str, value: Any) -> Case:
    body = json.dumps(changed(path, **{field: value})).encode()
    try:
        msgspec.json.decode(body)
    except msgspec.DecodeError:  # where JSON has no such number
        return Case(row, f"{field}={named(value)}", path, body, code="invalid_json")
    # As a record, so that it is asked for as a stream too.
    return Case(row, f"{field}={named(value)}", path, changed(path, **{field: value}), f"{field}*")


def _unknown() -> Iterator[Case]:
    code = "unknown_parameter"
    for path in BODIES:
        yield Case(51, "unknown", path, changed(path, temprature=1), "temprature", code=code)
        spec = changed(path, speculative_config={"method": "ngram"})
        yield Case(75, "ngram", path, spec, "speculative_config", code=code)
        yield Case(51, "long", path, changed(path, **{"x" * 100_000: 1}), "x*", code=code)
        odd = changed(path, **{"a\r\nb\x1b[31m": 1})
        yield Case(51, "control characters", path, odd, "a  b [31m", code=code)


def _unsupported() -> Iterator[Case]:
    named_so = [(path, *pair) for path in TEXT for pair in _UNSUPPORTED_EVERYWHERE.items()]
    named_so += [(path, *pair) for path, fields in _UNSUPPORTED.items() for pair in fields.items()]
    named_so += [
        (path, field, (75, value)) for path in (CHAT, COMPLETIONS) for field, value in
        _GUIDED.items()
    ]  # fmt: skip
    for path, field, (row, value) in named_so:
        body = changed(path, **{field: value})
        yield Case(row, f"unsupported {field}", path, body, field, code="unsupported_parameter",
                   says=field)  # fmt: skip


def _together() -> Iterator[Case]:
    """Fields that do not go together."""
    for path in TEXT:
        longest = LONGEST[path]
        both = changed(path, min_tokens=9, **{longest: 8})
        yield Case(29, "min_tokens > max_tokens", path, both, "*")
        alone = changed(path, min_tokens=CONTEXT + 1, **{longest: None})
        yield Case(30, "min_tokens > context", path, alone, "min_tokens")
        body = changed(path, stream=False, stream_options={})
        yield Case(51, "stream_options without stream", path, body, "stream_options")
    for path in (CHAT, COMPLETIONS):
        yield Case(37, "n without chance", path, changed(path, n=2, temperature=0), "n")
        body = changed(path, stream=True, prompt_logprobs=1)
        yield Case(40, "prompt_logprobs streamed", path, body, "prompt_logprobs")
    for fields, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 100, "n": 64}, "prompt"),
    ):
        yield Case(37, f"together {named(fields)}", COMPLETIONS, changed(COMPLETIONS, **fields),
                   param)  # fmt: skip
    for fields, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ):
        yield Case(41, f"together {named(fields)}", CHAT, changed(CHAT, **fields), param)
    yield Case(41, "top_logprobs alone", RESPONSES, changed(RESPONSES, top_logprobs=2),
               "top_logprobs")  # fmt: skip
    prefill = {"continue_final_message": True, "add_generation_prompt": True}
    yield Case(66, "both", CHAT, changed(CHAT, **prefill), "continue_final_message")
    messages = {"messages": [USER], **prefill}
    yield Case(66, "both", TOKENIZE, messages, "continue_final_message")
    yield Case(66, "messages and prompt", TOKENIZE, {"messages": [USER], "prompt": "a"}, "prompt")
    yield Case(66, "neither", TOKENIZE, {}, "prompt")
    told = {"prompt": "a", "add_generation_prompt": True}
    yield Case(66, "of messages", TOKENIZE, told, "*")


def _fine() -> Iterator[Case]:
    """What is as if it was left out, and the last of what is allowed."""
    neutral: dict[str, Any] = {
        **dict.fromkeys(_UNSUPPORTED_EVERYWHERE),
        "use_beam_search": False,
        "length_penalty": 1.0,
        "include_stop_str_in_output": False,
        "spaces_between_special_tokens": True,
    }
    edges: dict[str, list[Any]] = {
        "temperature": [0, 2],
        "top_p": [1e-9, 1],
        "min_p": [0, 1],
        "top_k": [-1, 0, 1, 2**31 - 1],
        "presence_penalty": [-2, 2],
        "frequency_penalty": [-2, 2],
        "repetition_penalty": [1e-9, 100],
        "seed": [-(2**63), 2**63 - 1],
        "stop": ["x" * 1024, ["a"] * 64, []],
        "priority": [-(2**31), 2**31 - 1],
        "cache_salt": ["x" * 256],
        "logit_bias": [{}, {str(VOCAB - 1): -100}, {"0": 100}, {str(i): 1 for i in range(1024)}],
    }
    for path in TEXT:
        yield Case(51, "neutral", path, short(path, **neutral), status=200)
        nothing = dict.fromkeys([*SAMPLING, "user", "stream_options"])
        del nothing["stream"]
        yield Case(28, "null", path, short(path, **nothing), status=200)
        yield Case(28, "no longest", path, changed(path), status=200, within_s=30.0)
        yield from (
            Case(SAMPLING[field][0], f"{field}={named(value)}", path, short(path, **{field: value}),
                 status=200, within_s=2.0)
            for field, values in edges.items()
            for value in values
        )  # fmt: skip
    yield Case(37, "best_of as n", COMPLETIONS, short(COMPLETIONS, n=2, best_of=2), status=200)
    yield Case(36, "64", COMPLETIONS, short(COMPLETIONS, n=64), status=200, within_s=5.0)
    body = changed(COMPLETIONS, max_tokens=0, echo=True)
    yield Case(27, "0 with echo", COMPLETIONS, body, status=200)


CASES = [
    *_unknown(),
    *_unsupported(),
    *(_out_of_range(*each) for each in _values()),
    *_together(),
    *_fine(),
]
