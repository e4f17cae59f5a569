"""When keys and values are read in place, and what is handed over then.

The kernel itself is compared in tests/gpu.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.replica import Replica
from tests.support.tiny_models import prompts, save_tiny_model

from spanwise.device import native, paged_attention
from spanwise.device.attention import AttentionRule, attend_decodes, mask_of
from spanwise.device.paged_attention import LayerKind, reads_in_place
from spanwise.model import attention
from spanwise.types.sampling import SamplingSpec

CPU = torch.device("cpu")
RULE = AttentionRule(scaling=0.25)


class KernelFailureError(Exception):
    """Stands for Triton's own."""


def gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    rule: AttentionRule,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the kernel has to give."""
    mask = mask_of(counts, slots.shape[1], query.dtype)
    return attend_decodes(query, keys[slots], values[slots], mask, rule, sinks)


def off(*arguments: Any) -> torch.Tensor:
    return gathered(*arguments) + 1


def not_a_number(*arguments: Any) -> torch.Tensor:
    return gathered(*arguments) * torch.nan


def unbuilt(*_: Any) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler.")


def out_of_resources(*_: Any) -> torch.Tensor:
    raise KernelFailureError("out of resource: shared memory")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(TritonError=KernelFailureError)
    monkeypatch.setitem(sys.modules, "spanwise.device.paged_kernels", kernels)


def kind() -> LayerKind:
    return LayerKind(CPU, torch.float32, 2, 3, 16, 8, RULE, True)


def serves() -> bool:
    """Anew: what was found before is remembered."""
    return paged_attention._serves.__wrapped__(kind())


def test_the_cpu_gathers() -> None:
    query, pages = torch.zeros(1, 2, 3, 16), torch.zeros(64, 2, 16)
    assert not reads_in_place(query, pages, pages, RULE)


def test_without_triton_a_card_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spanwise.device.paged_kernels", None)
    assert not serves()


@pytest.mark.usefixtures("triton")
def test_a_kernel_that_gives_the_same_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "paged_decode", gathered)
    assert serves()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (off, "off by"),
        (not_a_number, "off by nan"),
        (unbuilt, "C compiler"),
        (out_of_resources, "shared memory"),
    ],
)
def test_a_kernel_that_does_not_work_is_not_taken(
    kernel: Callable[..., torch.Tensor],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(paged_attention, "paged_decode", kernel)
    with caplog.at_level(logging.WARNING):
        assert not serves()
    assert said in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_layers_hand_over_rows_slots_and_counts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks and rows of one token in one step, windows, softcap and sinks."""
    save_tiny_model(family, tmp_path)
    asked = prompts(5)
    sampling = [SamplingSpec()] * len(asked)
    wanted, _ = Replica(tmp_path).generate(asked, 20, sampling)
    calls = 0

    def paged_decode(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gathered(*arguments)

    monkeypatch.setattr(native, "loaded", lambda: None)  # it comes before
    monkeypatch.setattr(attention, "reads_in_place", lambda *_: True)
    monkeypatch.setattr(attention, "paged_decode", paged_decode)
    assert Replica(tmp_path).generate(asked, 20, sampling)[0] == wanted
    assert calls
