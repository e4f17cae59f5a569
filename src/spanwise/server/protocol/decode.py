"""From the bytes of a body to a checked record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from pydantic import ValidationError

from spanwise.server.errors import ApiError, bad_request, cut, several
from spanwise.server.limits import MAX_ERRORS
from spanwise.server.protocol.strict import Strict

Body = TypeVar("Body", bound=Strict)

_EXACT = 2**53  # up to here a float is one whole number, and no other

_UNKNOWN = "unknown_parameter"
_CODES = {"extra_forbidden": _UNKNOWN, "unsupported": "unsupported_parameter"}
_MESSAGES = {"extra_forbidden": "is not known", "missing": "is required"}
# Errors whose text goes on where the field's name ends.
_PREDICATES = (*_MESSAGES, "unsupported")


def decode(model: type[Body], raw: bytes) -> Body:
    """The record that a body holds. Raises ApiError, which says what is wrong and where."""
    if not raw:
        raise bad_request("the body is empty; send a JSON object", code="invalid_json")
    try:
        data = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_request(cut(f"the body is not JSON: {error}"), code="invalid_json") from error
    except RecursionError as error:
        raise bad_request(
            "the body nests too deeply; make it flatter", code="invalid_json"
        ) from error
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from error


def _number(text: str) -> float:
    """A number with a point or an exponent. For JSON 7.0 is an integer, and for JSON Schema too."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


_DECODER = msgspec.json.Decoder(float_hook=_number)


def _refusal(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    said = []
    for problem in problems[: MAX_ERRORS + 1]:
        kind, where = problem["type"], path(problem["loc"])
        text = _MESSAGES.get(kind, problem["msg"])
        between = " " if kind in _PREDICATES else ": "
        said.append(f"{cut(where)}{between}{text}" if where else text)
    said += [""] * (len(problems) - len(said))
    first = problems[0]
    code = _CODES.get(first["type"], "invalid_value")
    return bad_request(several(said), path(first["loc"]) or None, code)


def path(loc: Sequence[str | int]) -> str:
    """Where in the body an error lies, as one would write it: ``messages[0].content``."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("<"):  # the name of one form out of several
            text += f".{part}" if text else part
    return text
