"""How the server's log lines are written: as text, or each as one JSON object."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(message)s"


def write_logs(form: LogFormat) -> None:
    """Write what is logged in this process to standard error, from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class JsonLines(logging.Formatter):
    """One object a line, in ASCII: ``time`` (UTC), ``level``, ``logger``, and what is said.

    What is said are the record's ``facts`` by name where it has some, else its ``message``; with
    an error comes its ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        facts = getattr(record, "facts", None)
        said |= facts if facts is not None else {"message": record.getMessage()}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        # JSON leaves DEL as it is; within a text it may be written so.
        return json.dumps(said).replace("\x7f", "\\u007f")
