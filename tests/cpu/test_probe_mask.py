"""What a probe learns from the function that would have built a layer's mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from spanwise.errors import ModelError
from spanwise.model import probe, seams

MaskFunction = Callable[..., torch.Tensor]


def causal(batch: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


def within(window: int) -> MaskFunction:
    return lambda batch, head, query, key: (key <= query) & (key > query - window)


def window_of(mask_function: MaskFunction) -> int:
    mask = seams._probe_mask(mask_function)
    return probe._window(nn.Identity(), {"attention_mask": mask, "sliding_window": 5})


def refusal(mask_function: MaskFunction) -> str:
    with pytest.raises(ModelError) as error:
        window_of(mask_function)
    said = str(error.value)
    assert said.startswith("Identity uses a mask that is neither causal nor a sliding window (")
    assert said.endswith("); not supported yet") and "\n" not in said
    return said


def test_the_mask_says_the_window() -> None:
    assert window_of(causal) == 0
    assert [window_of(within(window)) for window in (1, 7, 4096)] == [1, 7, 4096]


def test_without_a_mask_the_option_says_it() -> None:
    assert probe._window(nn.Identity(), {"attention_mask": None, "sliding_window": 5}) == 5
    assert probe._window(nn.Identity(), {"sliding_window": None}) == 0


@pytest.mark.parametrize(
    "mask_function",
    [
        lambda batch, head, query, key: key >= 0,
        lambda batch, head, query, key: key < query,
        lambda batch, head, query, key: (key <= query) & (key // 8 == query // 8),
    ],
    ids=["bidirectional", "without itself", "chunked"],
)
def test_another_form_of_mask_is_refused(mask_function: MaskFunction) -> None:
    assert "(chunked or bidirectional attention)" in refusal(mask_function)


def test_a_mask_that_was_changed_is_refused() -> None:
    changed = seams._probe_mask(causal) * 2
    with pytest.raises(ModelError, match="it is changed after transformers made it"):
        probe._window(nn.Identity(), {"attention_mask": changed})


def test_a_function_that_fails_is_quoted() -> None:
    table = torch.zeros(1, 9)
    by_sequence = refusal(lambda batch, head, query, key: table[batch, key] == 0)
    assert "its function says: IndexError: index 4194305 is out of bounds" in by_sequence
    starts = torch.zeros(1, device="meta")
    by_value = refusal(lambda batch, head, query, key: query >= starts[batch])
    assert "its function says: " in by_value and "meta tensor" in by_value


def test_a_defect_is_not_taken_for_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sees: object, query: int) -> int:
        raise IndexError("a list of ours is too short")

    monkeypatch.setattr(probe, "_reach", broken)
    with pytest.raises(IndexError, match="ours"):
        window_of(causal)
