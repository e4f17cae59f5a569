from __future__ import annotations

import pytest

from spanwise.cost.card import card_cache_bytes
from spanwise.errors import DeviceError

GIB = 1 << 30


def test_what_weights_and_cuda_leave_is_the_cache() -> None:
    assert card_cache_bytes("cuda:0", 80 * GIB, 1, 20 * GIB, 0.1) == 51 * GIB


def test_ranks_on_one_card_share_it_equally() -> None:
    both = 2 * card_cache_bytes("cuda:0", 80 * GIB, 2, 10 * GIB, 0.1)
    assert both == card_cache_bytes("cuda:0", 80 * GIB, 1, 20 * GIB, 0.1) - GIB


def test_weights_that_do_not_fit_name_card_and_bytes() -> None:
    with pytest.raises(DeviceError) as error:
        card_cache_bytes("cuda:1", 8 * GIB, 1, 14 * GIB, 0.1)
    text = str(error.value)
    assert "\n" not in text
    assert "cuda:1 has 8,192 MiB free" in text and "14,336 MiB of weights" in text
