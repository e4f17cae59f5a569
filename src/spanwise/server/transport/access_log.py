"""One log line for each answer, of nothing but what is safe to keep."""

from __future__ import annotations

import logging

_MAX_LENGTH = 200
_LINE = (
    "method=%(method)s path=%(path)s status=%(status)d duration_ms=%(duration_ms).1f "
    "request_id=%(request_id)s"
)


class AccessLog:
    """Writes to ``logger``, or nowhere. The record's ``args`` hold the values by name.

    No query string, header or body is logged; what a client chose is escaped and cut.
    """

    def __init__(self, logger: logging.Logger | None) -> None:
        self._logger = logger

    def answered(
        self, method: str, path: str, status: int, duration_s: float, request_id: str
    ) -> None:
        """The application answered, in whole or in part."""
        if self._logger is not None:
            values = {
                "method": _escaped(method),
                "path": _escaped(path),
                "status": status,
                "duration_ms": duration_s * 1e3,
                "request_id": _escaped(request_id),
            }
            self._logger.info(_LINE, values)

    def refused(self, status: int, request_id: str) -> None:
        """The transport answered instead, before there was a whole request."""
        self.answered("-", "-", status, 0.0, request_id)


def _escaped(text: str) -> str:
    """In ASCII and one word, whatever it holds."""
    return ascii(text[:_MAX_LENGTH])[1:-1].replace(" ", "\\x20")
