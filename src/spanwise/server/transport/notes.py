"""What the log is to say of a request beyond its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from spanwise.server.transport.access_log import Fact

NOTES = "spanwise.notes"
"""Where a request's scope has its notes."""
REQUEST_ID = "spanwise.request_id"
"""Where a request's scope has its name, once it has one."""


@dataclass
class RequestNotes:
    """Written by whoever learns something; ``begun_s``: when the request came.

    ``facts`` are harmless, by name. ``prompts`` only stand here where the operator wants them.
    """

    begun_s: float
    facts: dict[str, Fact] = field(default_factory=dict)
    prompts: list[Any] = field(default_factory=list)

    def add(self, name: str, count: int) -> None:
        """Count on, where several parts of a request each have some."""
        before = self.facts.get(name, 0)
        assert isinstance(before, int)
        self.facts[name] = before + count

    @property
    def all_facts(self) -> dict[str, Fact]:
        """With the prompts, as JSON."""
        if not self.prompts:
            return self.facts
        return self.facts | {"prompt": json.dumps(self.prompts, default=str)}
