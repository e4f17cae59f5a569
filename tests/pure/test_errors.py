"""One line of an error, whatever the error holds."""

from __future__ import annotations

import pytest

from spanwise.errors import ModelError, WorkerError, reason


class RefusedError(Exception):
    """A kind of some library."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such value"), "no such value"),
        (RuntimeError("out of memory\nset X to see more\nframe 0"), "out of memory"),
        (AssertionError("not compiled with CUDA"), "not compiled with CUDA"),
        (FileNotFoundError(2, "No such file", "a b"), "[Errno 2] No such file: 'a b'"),
        (KeyError("width"), "KeyError: 'width'"),
        (RefusedError("not\tthis  way"), "RefusedError: not this way"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (RefusedError(), "RefusedError"),
        (RefusedError("\n  first\n  second"), "RefusedError: first"),
        (ValueError("one of: \n(1) a file,\n(2) a name"), "one of: (1) a file, (2) a name"),
    ],
    ids=str,
)
def test_a_foreign_error_says_its_first_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_what_nobody_expected_is_led_by_its_kind() -> None:
    assert reason(ValueError("not enough values"), expected=False) == (
        "ValueError: not enough values"
    )
    assert reason(ValueError(), expected=False) == "ValueError"
    assert reason(WorkerError("rank 1 is late"), expected=False) == "rank 1 is late"


def test_a_foreign_error_is_short_and_ours_is_whole() -> None:
    long = "word " * 100
    assert reason(ValueError(long)) == long[:200]
    assert reason(ModelError(f"folder x\n{long}")) == f"folder x {long.strip()}"
