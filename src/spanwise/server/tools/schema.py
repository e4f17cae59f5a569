"""What a function's JSON schema says of its arguments, for formats that write them as bare text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from spanwise.server.tools.json_reader import json_kind

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_NUMBERS = frozenset({"number", "integer"})
# Where chains of references and nestings are no longer followed.
_MAX_HOPS = 32
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
# What describes the object as a whole, so that its properties alone do not say all of it.
_OPENING_KEYS = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
        *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas"),
    }
)

Schema = Mapping[str, Any] | bool


def closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema for a model to be held to: no arguments but those it lists, if it lists any.

    JSON schema lets an object have any others; no function takes those.
    """
    schema = {"type": "object", **parameters}
    listed = _object(schema.get("properties")).keys()
    names_all = "properties" in schema or not parameters
    if (
        names_all
        and not _OPENING_KEYS & schema.keys()
        and _strings(schema.get("required")) <= listed
    ):
        schema["additionalProperties"] = False
    return schema


def arguments(parameters: Mapping[str, Any]) -> dict[str, tuple[Schema, bool]]:
    """Every argument the schema lists, in its order: its schema, and whether it is required."""
    properties: dict[str, Schema] = {}
    required: set[str] = set()
    for part in _parts(parameters, parameters, set()):
        properties |= _object(part.get("properties"))
        required |= _strings(part.get("required"))
    for name in sorted(required - properties.keys()):
        properties[name] = True
    return {name: (schema, name in required) for name, schema in properties.items()}


def standalone(schema: Schema, root: Mapping[str, Any]) -> dict[str, Any]:
    """One argument's schema, with the definitions it may refer to."""
    if not isinstance(schema, Mapping):
        return {} if schema else {"not": {}}
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**definitions, **schema}


def json_types(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types a value may have. What cannot be read of the schema allows all."""
    return _types(schema, root, {}, 0)


def json_from_text(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument written as bare text.

    A text stays a string wherever the schema takes one; where it takes other types too, only what
    can be nothing else is read as such. A text of none of the types is handed on as a string: the
    caller sees what the model wrote.
    """
    word = text.strip()
    word = _PYTHON_WORDS.get(word, word)
    kind = json_kind(word)
    fits = kind is not None and (kind in types or (kind in _NUMBERS and bool(_NUMBERS & types)))
    clear = "string" not in types or types >= ALL_TYPES or kind in ("null", "object", "array")
    if fits and kind != "string" and clear:
        return word
    return json.dumps(text, ensure_ascii=False)


def object_json(members: Mapping[str, str]) -> str:
    """A JSON object whose values are JSON already."""
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in members.items())
    return "{" + ", ".join(pairs) + "}"


def _types(
    schema: object, root: Mapping[str, Any], seen: dict[str, frozenset[str]], hops: int
) -> frozenset[str]:
    """``seen``: what references stand for, so that each is followed once however many there are."""
    if not isinstance(schema, Mapping) or hops > _MAX_HOPS:
        return ALL_TYPES
    allowed = ALL_TYPES
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in seen:
            seen[reference] = ALL_TYPES
            seen[reference] = _types(_resolve(reference, root), root, seen, hops + 1)
        allowed &= seen[reference]
    named = schema.get("type")
    if named is not None:
        allowed &= {named} if isinstance(named, str) else _strings(named)
    values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
    if values:
        allowed &= {kind for value in values if (kind := json_kind(json.dumps(value)))}
    for key in ("anyOf", "oneOf"):
        options = [_types(option, root, seen, hops + 1) for option in _list(schema.get(key))]
        allowed &= frozenset().union(*options) if options else ALL_TYPES
    for part in _list(schema.get("allOf")):
        allowed &= _types(part, root, seen, hops + 1)
    return allowed


def _parts(
    schema: object, root: Mapping[str, Any], seen: set[str], hops: int = 0
) -> Iterator[Mapping[str, Any]]:
    """The schema and all that it takes in by reference or ``allOf``."""
    if not isinstance(schema, Mapping) or hops > _MAX_HOPS:
        return
    yield schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        yield from _parts(_resolve(reference, root), root, seen, hops + 1)
    for part in _list(schema.get("allOf")):
        yield from _parts(part, root, seen, hops + 1)


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    """What a reference within the same schema points to, None for any other."""
    if not reference.startswith("#"):
        return None
    found: object = root
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _strings(value: object) -> set[str]:
    return {item for item in _list(value) if isinstance(item, str)}
