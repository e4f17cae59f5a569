"""Section 1, rows 1 to 13: bodies that are none."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

from tests.server.bad_input.case import BODIES, FIRST, MAX_BODY_BYTES, Case, changed, named, short

RAW: dict[str, tuple[int, bytes]] = {
    "empty": (1, b""),
    "no JSON": (2, b'{: "model"'),
    "unfinished": (2, b'{"model": "x"'),
    "control character": (2, b'{"model": "a\x00b"}'),
    "NaN": (2, b'{"model": NaN}'),
    "a number of 5,000 digits": (2, b'{"model": ' + b"9" * 5000 + b"}"),
    "null": (3, b"null"),
    "list": (3, b"[]"),
    "text": (3, b'"x"'),
    "number": (3, b"3"),
    "true": (3, b"true"),
    "trailing bytes": (4, b"{} {}"),
    "a NUL behind": (4, b"{}\x00"),
    "invalid UTF-8": (5, b'{"model": "\xff"}'),
    "half a surrogate pair": (5, b'{"model": "\\ud800"}'),
    "a surrogate in UTF-8": (5, b'{"model": "\xed\xa0\x80"}'),
    "UTF-16": (6, '{"model": "x"}'.encode("utf-16")),
    "UTF-32": (6, '{"model": "x"}'.encode("utf-32")),
    "byte order mark": (6, b'\xef\xbb\xbf{"model": "x"}'),
    "nested": (7, b"[" * 100_000),
    "nested objects": (7, b'{"a":' * 100_000),
    "nested in a field": (7, b'{"model":' + b"[" * 100_000),
}
OTHER_KINDS = (
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "application/jsonx",
    "application/json, text/plain",
    "*/*",
)
RIGHT_KINDS = ("application/json; charset=UTF-8", "Application/JSON")


@cache
def too_large() -> bytes:
    """A byte more than the server takes."""
    return b'{"model": "' + b"x" * (MAX_BODY_BYTES - 12) + b'"}'


@cache
def just_fits() -> bytes:
    """As much as it takes."""
    return b'{"model": "' + b"x" * (MAX_BODY_BYTES - 13) + b'"}'


@cache
def bomb() -> bytes:
    """Little that would become too much."""
    return gzip.compress(b'{"model": "' + b"x" * (64 << 20) + b'"}')


def _of_any_route(path: str) -> list[Case]:
    raw = [
        Case(row, name, path, content, code="invalid_json") for name, (row, content) in RAW.items()
    ]
    kinds = [
        Case(13, named(kind), path, b"{}", status=415, headers={"content-type": kind})
        for kind in OTHER_KINDS
    ]
    right = json.dumps(short(path)).encode()
    kinds += [
        Case(13, named(kind), path, right, status=200, headers={"content-type": kind})
        for kind in RIGHT_KINDS
    ]
    large = [
        Case(11, "a byte more", path, too_large, status=413, code="body_too_large"),
        Case(11, "all there may be", path, just_fits, "*", within_s=2.0),
        Case(11, "gzip bomb", path, bomb, status=415, headers={"content-encoding": "gzip"}),
        Case(11, "deflate", path, b"x", status=415, headers={"content-encoding": "deflate"}),
    ]
    wrong: list[Any] = [{"x": None}] * 1000
    many = {f"unknown_{i}": i for i in range(200)}
    most = {f"u{i}": i for i in range(50_000)}
    mistakes = [
        Case(12, "every element", path, changed(path, **{FIRST[path]: wrong}), "*"),
        Case(12, "many fields", path, changed(path, **many), "unknown_0", says="; and 190 more"),
        Case(12, "50,000 fields", path, changed(path, **most), "*"),
        Case(12, "fields of odd names", path, changed(path, **{"\n\x1b" * 500: 1}), "*"),
    ]
    return [*raw, *kinds, *large, *mistakes]


CASES = [case for path in BODIES for case in _of_any_route(path)]
