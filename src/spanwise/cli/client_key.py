"""The API key that a client sends."""

from __future__ import annotations

import os

from spanwise.errors import InputError

VARIABLE = "SPANWISE_API_KEY"


def client_key(given: str | None) -> str | None:
    """The key of the flag, else the first of the environment's. Raises InputError."""
    key = given if given is not None else os.environ.get(VARIABLE, "").partition(",")[0]
    if not (key.isascii() and key.isprintable()):
        raise InputError("the API key must be printable ASCII; it travels in a header")
    return key or None
