"""How each format writes calls, as its models' templates do; and what is read of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from spanwise.server.tools import deepseek
from spanwise.server.tools.events import CallArguments, CallEnd, CallStart, Text, ToolEvent
from spanwise.server.tools.formats import FORMATS, tool_format
from spanwise.server.tools.json_reader import json_kind
from spanwise.server.tools.tool import Tool, ToolChoice
from spanwise.server.tools.tool_format import ToolFormat

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "dry": {"type": "boolean"},
            "near": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "days"],
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
)
NOW = Tool("now")
TOOLS = (WEATHER, NOW)
REQUIRED = ToolChoice("required")
BY_NAME = {known.name: known for known in FORMATS}
EVERY_FORMAT = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)

# A call as (name, arguments), a text as itself.
Piece = str | tuple[str, dict[str, Any]]


def joined(events: Iterable[ToolEvent]) -> list[Piece]:
    """What the events say, and that they come in order: texts joined, calls whole."""
    pieces: list[Piece] = []
    open_call: tuple[int, str, str] | None = None
    num_calls = 0
    for event in events:
        match event:
            case Text(text):
                assert text and open_call is None
                if pieces and isinstance(last := pieces[-1], str):
                    pieces[-1] = last + text
                else:
                    pieces.append(text)
            case CallStart(index, _, name):
                assert open_call is None and index == num_calls
                open_call, num_calls = (index, name, ""), num_calls + 1
            case CallArguments(index, fragment):
                assert open_call is not None and index == open_call[0]
                open_call = (index, open_call[1], open_call[2] + fragment)
            case CallEnd(index):
                assert open_call is not None and index == open_call[0]
                assert json_kind(open_call[2]) == "object"
                pieces.append((open_call[1], json.loads(open_call[2])))
                open_call = None
    assert open_call is None
    return pieces


def parse(
    known: ToolFormat, texts: Iterable[str], tools: Sequence[Tool] = TOOLS, **more: Any
) -> list[Piece]:
    parser = known.parser(tools, request_id="r", **more)
    events = [event for text in texts for event in parser.feed(text)]
    return joined(events + parser.finish())


def cut(text: str, borders: Iterable[int]) -> list[str]:
    inner = sorted({border % (len(text) + 1) for border in borders})
    return [text[a:b] for a, b in zip([0, *inner], [*inner, len(text)], strict=True)]


# --- how each format writes calls, as its models' templates do


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def as_objects(calls: Sequence[tuple[str, dict[str, Any]]], key: str) -> list[str]:
    return [f'{{"name": "{name}", "{key}": {dumps(args)}}}' for name, args in calls]


def as_list(opening: str, closing: str) -> Callable[..., str]:
    return lambda *calls: f"{opening}[{', '.join(as_objects(calls, 'arguments'))}]{closing}"


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    blocks = as_objects(calls, "arguments")
    return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)


def qwen3_coder(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={k}>\n{bare(v)}\n</parameter>\n" for k, v in args.items())
        + "</function>\n</tool_call>"
        for name, args in calls
    )


def glm(line: str) -> Callable[..., str]:
    def write(*calls: tuple[str, dict[str, Any]]) -> str:
        return "\n".join(
            f"<tool_call>{name}{line}"
            + "".join(
                f"<arg_key>{k}</arg_key>{line}<arg_value>{bare(v)}</arg_value>{line}"
                for k, v in args.items()
            )
            + "</tool_call>"
            for name, args in calls
        )

    return write


def mistral(middle: str) -> Callable[..., str]:
    return lambda *calls: "".join(
        f"[TOOL_CALLS]{name}{middle}{dumps(args)}" for name, args in calls
    )


def deepseek_v3(*calls: tuple[str, dict[str, Any]]) -> str:
    inner = "\n".join(
        f"{deepseek.CALL}function{deepseek.SEPARATOR}{name}\n```json\n{dumps(args)}\n```"
        f"{deepseek.CALL_END}"
        for name, args in calls
    )
    return f"{deepseek.SECTION}{inner}{deepseek.SECTION_END}"


def deepseek_v31(*calls: tuple[str, dict[str, Any]]) -> str:
    inner = "".join(
        f"{deepseek.CALL}{name}{deepseek.SEPARATOR}{dumps(args)}{deepseek.CALL_END}"
        for name, args in calls
    )
    return f"{deepseek.SECTION}{inner}{deepseek.SECTION_END}"


def harmony(*calls: tuple[str, dict[str, Any]]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{dumps(args)}<|call|>"
        for name, args in calls
    )


def pythonic(*calls: tuple[str, dict[str, Any]], literal: Callable[[Any], str] = repr) -> str:
    written = (
        f"{name}({', '.join(f'{key}={literal(value)}' for key, value in args.items())})"
        for name, args in calls
    )
    return f"[{', '.join(written)}]"


WRITERS: dict[str, Callable[..., str]] = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "glm": glm("\n"),
    "glm_dense": glm(""),
    "llama_json": lambda *calls: "; ".join(as_objects(calls, "parameters")),
    "mistral_list": as_list("[TOOL_CALLS]", ""),
    "mistral": mistral("[ARGS]"),
    "mistral_with_ids": mistral("[CALL_ID]abcdefghi[ARGS]"),
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "phi4_mini": as_list("<|tool_call|>", "<|/tool_call|>"),
    "functools": as_list("functools", ""),
    "granite": as_list("<|tool_call|>", ""),
    "harmony": harmony,
    "pythonic": pythonic,
}
# A list of Python calls, or a bare object, is a call only where an answer begins with it.
ONLY_AT_START = {"llama_json", "pythonic"}

NESTED: dict[str, Any] = {
    "city": 'Zürich "x" \\ 日本\n\t🌍 </tool_call>',
    "days": -2,
    "tags": ["a", "<b>", "}"],
    "dry": True,
    "near": {"x": 1.5, "y": {"z": [None, {}]}},
}
FIRST = ("get_weather", NESTED)
SECOND = ("now", {})

QUOTED = '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}'
FOR_TOOLS = "{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}"
TEMPLATES = {
    "hermes": f'{FOR_TOOLS}{{{{- "within <tool_call>\\n{QUOTED}\\n</tool_call>" }}}}',
    "qwen3_coder": f"{FOR_TOOLS}{{{{ '<tool_call>\\n<function=' + name + '>\\n<parameter=' }}}}"
    "</tool_call> arguments",
    "glm": f"{FOR_TOOLS}<tool_call>{{n}}\n<arg_key>{{k}}</arg_key>\n<arg_value>{{v}}</arg_value>\n"
    "</tool_call> arguments",
    "glm_dense": f"{FOR_TOOLS}<tool_call>{{n}}<arg_key>{{k}}</arg_key><arg_value>{{v}}</arg_value>"
    "</tool_call> arguments",
    "llama_json": f"{FOR_TOOLS}"
    """{{- 'Respond in the format {"name": function name, "parameters": dictionary' }}""",
    "mistral_list": f'{FOR_TOOLS}{{{{- "[TOOL_CALLS] [" }}}}',
    "mistral": f'{FOR_TOOLS}{{{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}}}',
    "mistral_with_ids": f"{FOR_TOOLS}{{{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]'}}}}",
    "deepseek_v3": f"{FOR_TOOLS}{deepseek.SECTION}{deepseek.SEPARATOR}```json",
    "deepseek_v31": f"{FOR_TOOLS}{deepseek.SECTION}{deepseek.SEPARATOR}",
    "phi4_mini": f"{FOR_TOOLS}{{{{- '<|tool_call|>' + (call | tojson) + '<|/tool_call|>' -}}}}",
    "functools": f'{FOR_TOOLS}formatted as functools[{{"name": [function name]',
    "granite": f"{FOR_TOOLS}<|start_of_role|> respond only with <|tool_call|> followed by a list",
    "harmony": f"{FOR_TOOLS}<|channel|>commentary to=functions.f<|message|>{{{{ f }}}}<|call|>",
    "pythonic": f"{FOR_TOOLS}Respond in the format [func_name1(params_name1=params_value1)]",
}
THINKING_HERMES = tool_format(
    "{% if tools %}<tool_call>{name, arguments}</tool_call>{% endif %}<think></think>"
)
