"""What a measurement is asked to do."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec

from spanwise.bench.goodput import GoodputLimits
from spanwise.bench.lengths import Lengths
from spanwise.bench.numbers import at_least
from spanwise.errors import InputError

Endpoint = Literal["completions", "chat"]
_URL = re.compile(r"https?://[A-Za-z0-9._~:/%\[\]-]+")


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a server. Together with the server it decides all that is sent.

    ``base_url``: where the server is, with ``/v1`` or without. ``request_rate``: requests a second,
    infinite for all at once; or ``concurrency``: so many in flight, always. ``input_len`` and
    ``output_len``: tokens of prompts and answers. ``prompts``: the name of a file they come from.
    ``extra_body``: fields of every request's body. ``timeout_s``: for a whole answer.
    """

    base_url: str
    model: str | None
    endpoint: Endpoint
    num_requests: int
    request_rate: float | None
    concurrency: int | None
    input_len: Lengths
    output_len: Lengths
    prompts: str | None
    ignore_eos: bool
    extra_body: dict[str, Any]
    seed: int
    num_warmup: int
    timeout_s: float
    goodput: GoodputLimits | None

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        if _URL.fullmatch(self.base_url) is None:
            raise InputError(
                f"base_url must be like http://localhost:8000, got {self.base_url!r:.200}"
            )
        if (self.request_rate is None) == (self.concurrency is None):
            raise InputError("give one of request_rate and concurrency")
        at_least("num_requests", self.num_requests, 1)
        at_least("concurrency", self.concurrency, 1)
        at_least("num_warmup", self.num_warmup, 0)
        if self.request_rate is not None and not self.request_rate > 0:
            raise InputError(f"request_rate must be above 0, got {self.request_rate:g}")
        if not 0 < self.timeout_s < math.inf:
            raise InputError(f"timeout must be above 0 seconds, got {self.timeout_s:g}")

    @property
    def server_url(self) -> str:
        """The base URL without a slash or ``/v1`` at its end."""
        return self.base_url.rstrip("/").removesuffix("/v1")
