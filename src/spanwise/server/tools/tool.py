"""The functions a request offers to the model, and which of them it must call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spanwise.errors import InputError

MAX_TOOLS = 128
# Deeper schemas are no function's arguments, and every reader of them recurses.
MAX_SCHEMA_DEPTH = 32
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TOOL_FIELDS = ("type", "function")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True)
class Tool:
    """One function. ``parameters`` is the JSON schema of its arguments, an object's.

    ``strict``: arguments match the schema in full; one that cannot be enforced is refused.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    description: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may, must or must not call; ``name`` only where one function is named."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def read_tools(value: object) -> tuple[Tool, ...]:
    """The ``tools`` of a chat request, checked. Raises InputError."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise InputError(f"tools must be a list of at least one function, got {value!r:.80}")
    if len(value) > MAX_TOOLS:
        raise InputError(f"tools has {len(value)} entries; give {MAX_TOOLS} at most")
    tools = tuple(_tool(entry, f"tools[{i}]") for i, entry in enumerate(value))
    seen: dict[str, int] = {}
    for i, tool in enumerate(tools):
        first = seen.setdefault(tool.name, i)
        if first != i:
            raise InputError(
                f"tools[{i}].function.name {tool.name!r} is that of tools[{first}] already; "
                "give each function a name of its own"
            )
    return tools


def read_tool_choice(value: object, tools: Sequence[Tool]) -> ToolChoice:
    """The ``tool_choice`` of a chat request, checked against its tools. Raises InputError."""
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if not tools and value != "none":
        raise InputError("tool_choice needs tools; give tools, or leave tool_choice out")
    match value:
        case "none":
            return ToolChoice("none")
        case "auto":
            return ToolChoice("auto")
        case "required":
            return ToolChoice("required")
        case {"type": "function", "function": {"name": str(name), **more}, **rest} if not (
            more or rest
        ):
            if all(tool.name != name for tool in tools):
                raise InputError(f"tool_choice names {name!r:.80}, which is not among tools")
            return ToolChoice("named", name)
    raise InputError(
        'tool_choice must be "none", "auto", "required" or '
        f'{{"type": "function", "function": {{"name": ...}}}}, got {value!r:.80}'
    )


def _tool(value: object, place: str) -> Tool:
    entry = _object(value, place, _TOOL_FIELDS)
    if entry.get("type") != "function":
        raise InputError(f'{place}.type must be "function", got {entry.get("type")!r:.80}')
    place = f"{place}.function"
    function = _object(entry.get("function"), place, _FUNCTION_FIELDS)
    name, description = function.get("name"), function.get("description")
    strict, parameters = function.get("strict"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{place}.name must be 1 to 64 letters, digits, underscores or dashes, got {name!r:.80}"
        )
    if not isinstance(description, str | None):
        raise InputError(f"{place}.description must be a string, got {description!r:.80}")
    if not isinstance(strict, bool | None):
        raise InputError(f"{place}.strict must be true or false, got {strict!r:.80}")
    _check_parameters(parameters, f"{place}.parameters")
    try:
        json.dumps(function, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} has half a surrogate pair; give valid Unicode") from error
    return Tool(name, parameters or {}, description, bool(strict))


def _object(value: object, place: str, fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place} must be an object, got {value!r:.80}")
    for key in value:
        if key not in fields:
            raise InputError(f"{place}.{key:.80} is not known; {place} takes {', '.join(fields)}")
    return value


def _check_parameters(value: object, place: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise InputError(f"{place} must be a JSON schema, an object, got {value!r:.80}")
    if value.get("type", "object") != "object":
        raise InputError(f'{place}.type must be "object", got {value["type"]!r:.80}')
    properties, required = value.get("properties", {}), value.get("required", [])
    if not isinstance(properties, dict):
        raise InputError(f"{place}.properties must be an object, got {properties!r:.80}")
    for key, schema in properties.items():
        if not isinstance(schema, dict | bool):
            raise InputError(
                f"{place}.properties[{key!r:.80}] must be a schema, got {schema!r:.80}"
            )
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise InputError(f"{place}.required must be a list of strings, got {required!r:.80}")
    if _is_deeper(value, MAX_SCHEMA_DEPTH):
        raise InputError(f"{place} nests deeper than {MAX_SCHEMA_DEPTH} levels; make it flatter")


def _is_deeper(value: object, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_is_deeper(item, limit - 1) for item in inner)
