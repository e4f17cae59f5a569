"""The mask, and everything else that changes logits."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny_models import VOCAB
from tests.support.tokenizers import EOS

from spanwise.runner.mask import keep_allowed, packed_masks
from spanwise.runner.sampling import SampleRow, sample
from spanwise.types.sampling import SamplingSpec


def bits(*token_ids: int, vocab_size: int = VOCAB) -> bytes:
    whole = bytearray(-(-vocab_size // 8))
    for token_id in token_ids:
        whole[token_id // 8] |= 1 << token_id % 8
    return bytes(whole)


def random_logits(rows: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 3


@pytest.mark.parametrize("vocab_size", [VOCAB, 128, 70_001])
def test_each_row_has_its_own_mask(vocab_size: int) -> None:
    logits = random_logits(40, vocab_size)
    kept = logits.clone()
    chosen = [index for index in range(40) if index % 3]
    wanted = [{index, index + 30, vocab_size - 1 - index % 9} for index in chosen]
    masks = packed_masks([bits(*each, vocab_size=vocab_size) for each in wanted])
    keep_allowed(logits, torch.tensor(chosen), masks)
    for index, ids in zip(chosen, wanted, strict=True):
        assert set(logits[index].isfinite().nonzero().flatten().tolist()) == ids
        assert torch.equal(logits[index, list(ids)], kept[index, list(ids)])
    assert torch.equal(logits[::3], kept[::3])


def test_neighbours_with_and_without_a_mask_draw_what_they_draw_alone() -> None:
    logits = random_logits(60)
    rows = []
    for number in range(60):
        spec = SamplingSpec(temperature=number % 4 / 2, seed=number, top_k=number % 7, logprobs=1)
        allowed = bits(number, number + 1, number + 60) if number % 2 else None
        rows.append(SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, allowed))
    tokens, logprobs = sample(logits, rows)
    for number, row in enumerate(rows):
        if row.allowed is not None:
            assert tokens[number] in {number, number + 1, number + 60}
        alone = sample(logits[number : number + 1], [row])
        assert alone == ([tokens[number]], [logprobs[number]])
    free = sample(logits, [unmasked(row) for row in rows])[0]
    assert free[::2] == tokens[::2] and free != tokens


def unmasked(row: SampleRow) -> SampleRow:
    return SampleRow(row.spec, row.position, row.token_ids, row.num_prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_overrules_the_mask(temperature: float) -> None:
    """Not a bias, a penalty, a filter, nor what the model makes of the allowed tokens."""
    spec = SamplingSpec(
        temperature=temperature, logit_bias={7: 100.0, 20: -100.0, 21: -100.0}, top_k=1, top_p=0.01,
        min_p=1.0, repetition_penalty=50.0, presence_penalty=2.0, frequency_penalty=2.0,
    )  # fmt: skip
    history = (20, 20, 21, 20, 21)
    for value in (0.0, -torch.inf, torch.nan, -1e38):
        logits = random_logits(1)
        logits[0, [20, 21]] = value
        row = SampleRow(spec, 5, history, 1, bits(20, 21))
        assert sample(logits, [row])[0][0] in (20, 21)


def test_min_tokens_keeps_stop_tokens_out_unless_nothing_else_is_left() -> None:
    logits = random_logits(1)
    logits[0, EOS] = 50.0
    for temperature in (0.0, 1.0):
        spec = SamplingSpec(temperature=temperature, min_tokens=9, stop_token_ids=(EOS,))
        row = SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, bits(EOS, 30, 31))
        assert sample(logits, [row])[0][0] in (30, 31)
        row = SampleRow(spec, 5, (1, 2, 3, 4, 5), 3, bits(EOS))
        assert sample(logits, [row])[0] == [EOS]


def test_log_probabilities_are_those_of_the_unmasked_distribution() -> None:
    logits = random_logits(1)
    row = SampleRow(SamplingSpec(logprobs=3), 5, (1, 2, 3, 4, 5), 3, bits(77))
    (token,), (found,) = sample(logits, [row])
    assert token == 77 and found is not None
    right = logits.log_softmax(-1)[0]
    assert found.logprob == pytest.approx(right[77].item(), abs=2e-6)
    assert found.top_ids == tuple(right.topk(3).indices.tolist())
