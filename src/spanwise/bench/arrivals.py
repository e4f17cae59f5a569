"""When requests arrive: decided before the first is sent."""

from __future__ import annotations

import math
from random import Random


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which each request arrives, ``rate`` of them a second on average.

    Gaps are exponential; an infinite rate lets all arrive at once. The same seed gives the same
    times, and another rate the same times scaled.
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    random = Random(f"arrivals/{seed}")
    times, now = [], 0.0
    for _ in range(num_requests):
        now -= math.log(1.0 - random.random()) / rate
        times.append(now)
    return times
