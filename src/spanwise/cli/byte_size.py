"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from spanwise.errors import InputError

_POWERS = "KMGT"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?", re.IGNORECASE)


def parse_bytes(flag: str, text: str) -> int:
    """Bytes of "2GiB" (of 1024s), "512MB" (of 1000s) or "1000000". Raises InputError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{flag} must be a size such as 2GiB, 512MB or 1000000, got {text!r:.80}")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (_POWERS.index(unit.upper()) + 1 if unit else 0))


def format_bytes(num_bytes: int) -> str:
    """Three figures or so: "1.5 GiB", "17.0 MiB", "812 B"."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in _POWERS:
        size /= 1024
        if size < 1000 or unit == _POWERS[-1]:
            break
    return f"{size:.1f} {unit}iB" if size < 100 else f"{size:.0f} {unit}iB"
