"""Goodput: how many answers came as fast as was promised (https://arxiv.org/abs/2401.09670)."""

from __future__ import annotations

import re

import msgspec

from spanwise.errors import InputError

_LIMIT = re.compile(r"(ttft|tpot|e2e):(\d{1,9}(?:\.\d{1,9})?)", re.ASCII)


class GoodputLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The longest times that are still good, in seconds; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def are_kept(self, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """Whether one answer was good. One without a time per output token keeps that limit."""
        measured = ((self.ttft_s, ttft_s), (self.tpot_s, tpot_s), (self.e2e_s, e2e_s))
        return all(limit is None or time is None or time <= limit for limit, time in measured)


def parse_goodput(text: str) -> GoodputLimits:
    """Read "ttft:500,tpot:50,e2e:2000", milliseconds each. Raises InputError."""
    matches = [_LIMIT.fullmatch(part.strip()) for part in text.split(",")]
    limits = {f"{match[1]}_s": float(match[2]) / 1000 for match in matches if match is not None}
    if len(limits) != len(matches):
        raise InputError(
            "goodput must be milliseconds by name, each once, such as ttft:500,tpot:50,e2e:2000, "
            f"got {text!r:.80}"
        )
    return GoodputLimits(**limits)
