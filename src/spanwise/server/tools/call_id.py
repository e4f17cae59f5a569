"""The id of a call: random to look at, the same again when an answer is replayed."""

from __future__ import annotations

import hashlib
import string

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24
_SHORT_LENGTH = 9


def call_id(request_id: str, index: int, *, short: bool = False) -> str:
    """The id of call ``index`` of an answer: ``call_`` and 24 characters, or ``short``: 9 alone."""
    digest = hashlib.sha256(f"{request_id}\0{index}".encode()).digest()
    number, characters = int.from_bytes(digest, "big"), ""
    for _ in range(_SHORT_LENGTH if short else _LENGTH):
        number, place = divmod(number, len(_ALPHABET))
        characters += _ALPHABET[place]
    return characters if short else f"call_{characters}"
