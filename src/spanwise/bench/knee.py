"""Where a larger batch stops paying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

WORTH_IT = 1.2


def knee(sizes: Sequence[int], rates: Sequence[float]) -> int | None:
    """The first size after which doubling the batch gains less than ``WORTH_IT`` in throughput.

    A step that is not a doubling counts as its gain for each doubling. None where every one pays.
    """
    for (size, rate), (next_size, next_rate) in pairwise(zip(sizes, rates, strict=True)):
        if (next_rate / rate) ** (1 / math.log2(next_size / size)) < WORTH_IT:
            return size
    return None
