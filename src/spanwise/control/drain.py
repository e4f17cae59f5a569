"""How fast work goes away, as seen lately."""

from __future__ import annotations

import math

_WINDOW_S = 30.0


class DrainRate:
    """Requests and tokens finished per second of busy time, what is longer ago counting for less.

    Only busy time counts: an idle server shows nothing of how fast it can be. What happened
    30 busy seconds ago weighs 1/e; the last rate seen outlives any idle time. ``busy_s`` is the
    busy time weighed alike.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def elapse(self, busy_s: float) -> None:
        """Let so much busy time go by."""
        kept = math.exp(-busy_s / _WINDOW_S)
        self.busy_s = self.busy_s * kept + _WINDOW_S * (1.0 - kept)
        self._requests *= kept
        self._tokens *= kept

    def finish(self, num_tokens: int) -> None:
        """One request of so many tokens has finished, in busy time."""
        self._requests += 1.0
        self._tokens += num_tokens

    def seconds_for(self, num_requests: float, num_tokens: int) -> float | None:
        """How long so many requests and tokens take to finish; None if nothing has finished yet."""
        if not self._requests:
            return None
        share = num_requests / self._requests
        if self._tokens:
            share = max(share, num_tokens / self._tokens)
        return self.busy_s * share
