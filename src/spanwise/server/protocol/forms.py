"""A value that may come in several forms, told apart before it is looked at closely.

So an error speaks of the form that was meant, and not of all the others too. The forms' tags stand
in ``<>``; ``decode.path`` leaves them out.
"""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator

TEXT, TEXTS, TOKENS, TOKEN_LISTS = "<text>", "<texts>", "<tokens>", "<token lists>"
LIST, OBJECT = "<list>", "<object>"


def text_or_list(expected: str) -> Discriminator:
    """``TEXT`` or ``LIST``; ``expected`` says what else there should have been."""

    def form(value: Any) -> str | None:
        return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None

    return _discriminator(form, expected)


def text_or_object(expected: str) -> Discriminator:
    """``TEXT`` or ``OBJECT``."""

    def form(value: Any) -> str | None:
        return TEXT if isinstance(value, str) else OBJECT if isinstance(value, dict) else None

    return _discriminator(form, expected)


def texts_or_tokens(expected: str) -> Discriminator:
    """``TEXT``, ``TEXTS``, ``TOKENS`` or ``TOKEN_LISTS``, by the first element."""

    def form(value: Any) -> str | None:
        if isinstance(value, str):
            return TEXT
        if not isinstance(value, list):
            return None
        match value:
            case [int() | float(), *_]:
                return TOKENS
            case [list(), *_]:
                return TOKEN_LISTS
        return TEXTS

    return _discriminator(form, expected)


def by(field: str, names: tuple[str, ...], other: str | None = None) -> Discriminator:
    """``<name>``, as an object's field says; ``other`` is the tag of names not among these."""

    def form(value: Any) -> str | None:
        name = value.get(field) if isinstance(value, dict) else None
        if name in names:
            return f"<{name}>"
        return other if isinstance(name, str) else None

    choices = ", ".join(map(repr, names))
    return _discriminator(form, f"Input should be an object whose {field} is one of {choices}")


def _discriminator(form: Any, expected: str) -> Discriminator:
    return Discriminator(form, custom_error_type="form", custom_error_message=expected)
