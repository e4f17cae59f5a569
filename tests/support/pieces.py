"""Pieces run as stages would run them, beside the whole module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from spanwise.model.carried import Carried
from spanwise.model.piece_proof import run_all
from spanwise.model.pieces import Pieces, Stage


def draw_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Large enough that a bias or a skip that is left out shows; also what starts as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter.shape[-1], 1) if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 / fan**0.5)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval().requires_grad_(False)


class Sent:
    """A stage whose results come over a link: as numbers in order, in memory of their own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def run(self, inputs: Sequence[torch.Tensor], inbound: Sequence[Carried]) -> list[Carried]:
        return [
            each if isinstance(each, int) else each.clone(memory_format=torch.contiguous_format)
            for each in self._stage.run(inputs, inbound)
        ]


def even_bounds(num_pieces: int, num_stages: int) -> list[int]:
    return [num_pieces * stage // num_stages for stage in range(num_stages + 1)]


def cut(pieces: Pieces, num_stages: int) -> list[Sent]:
    bounds = even_bounds(pieces.num_pieces, num_stages)
    return [Sent(pieces.stage(first, end)) for first, end in pairwise(bounds)]


def run_cut(stages: Sequence[Sent], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    kept = [given.clone() for given in inputs]
    with torch.inference_mode():
        *_, outputs = run_all(stages, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "inputs changed"
    assert all(isinstance(output, torch.Tensor) for output in outputs)
    return [output for output in outputs if isinstance(output, torch.Tensor)]


def assert_same(own: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    assert len(own) == len(wanted)
    for mine, whole in zip(own, wanted, strict=True):
        assert mine.shape == whole.shape
        assert mine.dtype == whole.dtype
        if whole.is_floating_point():
            assert float((mine - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
        else:
            assert torch.equal(mine, whole)
