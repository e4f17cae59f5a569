"""What answers must match, under three names: in flags, and in a line of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from spanwise.errors import InputError
from spanwise.types.sampling import Grammar

_KINDS: dict[str, Literal["json_schema", "regex", "lark"]] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "grammar": "lark",
}
FIELDS = tuple(_KINDS)


def read_file(flag: str, text: str) -> str:
    """The text itself, or that of the file which ``@FILE`` names. Raises InputError."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{flag}: {text[1:]} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{flag}: {text[1:]} is not UTF-8") from error


def one_grammar(given: Mapping[str, Any]) -> Grammar | None:
    """The grammar that one of ``FIELDS`` gives; those that are None give none. Raises InputError.

    A JSON schema may be a text, or what the text would mean.
    """
    named = [(name, value) for name, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        said = " and ".join(name for name, _ in named)
        raise InputError(f"an answer can match one of {', '.join(FIELDS)}; this has {said}")
    ((name, value),) = named
    if name == "json_schema" and isinstance(value, dict | bool):
        value = msgspec.json.encode(value).decode()
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {value!r:.80}")
    grammar = Grammar(_KINDS[name], value)
    from spanwise.engine.grammar import check_text  # slower than all that --help needs

    check_text(grammar)
    return grammar
