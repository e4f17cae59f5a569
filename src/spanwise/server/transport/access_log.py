"""One log line for each answer, of nothing but what is safe to keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping

_MAX_LENGTH = 200
_MAX_PROMPT_LENGTH = 10_000

Fact = str | int | float | bool


class AccessLog:
    """Writes to ``logger``, or nowhere.

    The record's ``args`` hold the values by name, each in one word of ASCII; its ``facts`` hold
    them as they are, for a form that escapes by itself. No query string, header or body is logged,
    and what a client chose is cut.
    """

    def __init__(self, logger: logging.Logger | None) -> None:
        self._logger = logger

    def answered(
        self,
        method: str,
        path: str,
        status: int,
        duration_s: float,
        request_id: str,
        more: Mapping[str, Fact] | None = None,
    ) -> None:
        """The application answered, in whole or in part; ``more`` is what it says of that."""
        if self._logger is None:
            return
        facts: dict[str, Fact] = {
            "method": method,
            "path": path,
            "status": status,
            "duration_ms": round(duration_s * 1e3, 1),
            "request_id": request_id,
            **(more or {}),
        }
        facts = {name: _cut(name, value) for name, value in facts.items()}
        line = " ".join(f"{name}=%({name})s" for name in facts)
        words = {name: _word(value) for name, value in facts.items()}
        self._logger.info(line, words, extra={"facts": facts})

    def refused(self, status: int, request_id: str) -> None:
        """The transport answered instead, before there was a whole request."""
        self.answered("-", "-", status, 0.0, request_id)


def _cut(name: str, value: Fact) -> Fact:
    if isinstance(value, str):
        return value[: _MAX_PROMPT_LENGTH if name == "prompt" else _MAX_LENGTH]
    return value


def _word(value: Fact) -> Fact:
    """A text in ASCII and one word, whatever it holds."""
    return ascii(value)[1:-1].replace(" ", "\\x20") if isinstance(value, str) else value
