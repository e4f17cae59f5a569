"""What was measured of one request."""

from __future__ import annotations

from array import array

import msgspec

from spanwise.bench.answer import Failure


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request that has ended. Times in seconds after the start of the load.

    ``sent_s``: when it was handed over for sending, so that connecting counts as waiting.
    ``times_s``: when each piece of the answer's text came. ``end_s``: the end of the answer.
    Tokens are the server's own count, None where it gave none.
    """

    index: int
    sent_s: float
    times_s: array[float]
    end_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    failure: Failure | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token; only of an answer that did not fail."""
        return self.times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the answer."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is no second, or no count."""
        if self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.end_s - self.times_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies, as seen: times between pieces of text."""
        return [
            after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)
        ]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One load, as far as it came.

    ``sent_s``: when each request was sent, in the schedule's order. ``records``: those that have
    ended. ``cpu_s``: processor time that the generator itself took of ``wall_s``.
    """

    num_requests: int
    sent_s: list[float]
    records: list[RequestRecord]
    wall_s: float
    cpu_s: float
    interrupted: bool
