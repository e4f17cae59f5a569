"""Combining what the experts of several ranks gave: always the bits of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.support.ranks import BACKENDS, Run, drawn
from tests.support.replica import Replica
from tests.support.tiny_models import VOCAB, save_tiny_model

from spanwise.comm.communicator import Communicator
from spanwise.model import experts
from spanwise.model.experts import combine, combine_by_owner, combine_on_every_rank, weighted_sum
from spanwise.types.sampling import SamplingSpec

TOP_K, HIDDEN = 3, 8


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("way", [combine_on_every_rank, combine_by_owner])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_bits_of_one_rank(
    run: Run, way: Callable[..., torch.Tensor], size: int, dtype: torch.dtype
) -> None:
    tokens = (1, 2, 3, 5, 33)

    def body(comm: Communicator) -> list[torch.Tensor]:
        mixed = []
        for count in tokens:
            products, weights = drawn_products(count, dtype)
            holder = drawn((count, TOP_K), torch.int64, 7 * count) % size
            own = torch.where((holder == comm.rank)[..., None], products, 0)
            mixed.append(way(comm, own, weights))
        return mixed

    for result in run(size, body):
        for count, mixed in zip(tokens, result, strict=True):
            want = weighted_sum(*drawn_products(count, dtype))
            assert mixed.shape == (count, HIDDEN) and mixed.dtype == dtype
            assert torch.equal(bits(mixed), bits(want)), count


def drawn_products(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    products = drawn((count, TOP_K, HIDDEN), dtype, count)
    products[:, :, 0] = -0.0
    return products, drawn((count, TOP_K), torch.float32, count + 1).softmax(-1)


class Watched:
    """A communicator of two that says what was called; the other rank gives nothing."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 2
        self.called: list[str] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.called.append("all_reduce")
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        self.called.append("all_gather")
        return tensor.new_zeros(sum(sizes), tensor.shape[1])

    def all_to_all(self, tensor: torch.Tensor, sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        self.called.append("all_to_all")
        return tensor.new_zeros(2 * sizes[0][0], *tensor.shape[1:])

    def barrier(self) -> None:
        raise AssertionError("nobody asked for it")


@pytest.mark.parametrize(
    ("more", "called"), [(-1, ["all_reduce"]), (0, ["all_to_all", "all_gather"])]
)
def test_the_way_depends_on_bytes_alone(more: int, called: list[str]) -> None:
    tokens = experts._MANY_BYTES // (TOP_K * HIDDEN * 4) + 1 + more
    comm = Watched()
    products = drawn((tokens, TOP_K, HIDDEN), torch.float32, 0)
    assert combine(comm, products, torch.ones(tokens, TOP_K)).shape == (tokens, HIDDEN)
    assert comm.called == called


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_says_the_same_either_way(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(family, tmp_path)
    prompts = [[5, 9, 30, 31], [7], list(range(3, 40))]
    wanted = [SamplingSpec(logprobs=VOCAB)] * len(prompts)

    def said(tp: int, many_bytes: int) -> object:
        monkeypatch.setattr(experts, "_MANY_BYTES", many_bytes)
        replica = Replica(tmp_path, tp=tp, expert_parallel=tp > 1)
        return replica.generate(prompts, 6, wanted)

    assert said(3, 0) == said(3, 1 << 40)
    assert said(2, 0) == said(2, 1 << 40)
