"""On a card a step's tokens are those of the CPU, and only their way back is waited for.

``tests/cpu/test_sampling_on_card.py`` counts the copies on a stand-in.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.cpu.test_sampling_on_card import EVERYTHING, mask, mixed_rows, row_of

from spanwise.runner.sampling import sample

pytestmark = pytest.mark.gpu


def test_only_the_way_back_is_waited_for() -> None:
    vocab = 32_000
    rows = [row_of(mask(vocab), **EVERYTHING), row_of(**EVERYTHING), row_of(temperature=1.0)] * 8
    logits = torch.randn(len(rows), vocab, dtype=torch.bfloat16).cuda()
    sample(logits, rows)  # what is built at the first use
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in seen if "synchronizing" in str(each.message)]) == 1


@pytest.mark.parametrize("vocab", [1013, 32_000])
def test_tokens_are_those_of_the_cpu(vocab: int) -> None:
    """But where two scores are as near as the rounding of an exponential or a logarithm."""
    rows = mixed_rows(vocab) * 5
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(1)) * 3
    wanted, wanted_logprobs = sample(logits, rows)
    found, found_logprobs = sample(logits.cuda(), rows)
    same = [one == other for one, other in zip(found, wanted, strict=True)]
    assert sum(same) >= 0.99 * len(rows)
    for is_same, one, other in zip(same, found_logprobs, wanted_logprobs, strict=True):
        if is_same and one is not None and other is not None:
            assert (one.rank, one.top_ids) == (other.rank, other.top_ids)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
