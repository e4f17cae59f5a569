"""Cards as devices: their count, their memory, and what happens when it runs out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.support.layouts import running
from tests.support.tiny_models import save_tiny_model

from spanwise import LLM
from spanwise.device.devices import cuda_cards
from spanwise.device.memory import (
    allocate_arena,
    free_bytes,
    memory_use,
    move_together,
    place,
    synchronize,
)
from spanwise.errors import DeviceError
from spanwise.model.shard import load_shard
from spanwise.types.worker import DeviceSpec, ShardSpec
from spanwise.worker.supervisor import Supervisor

pytestmark = pytest.mark.gpu

CARD = DeviceSpec(kind="cuda")
MIB = 1 << 20


def test_the_driver_and_torch_count_the_same_cards() -> None:
    cards = cuda_cards()
    assert len(cards) == torch.cuda.device_count()
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(cards) == 1:
        names = [torch.cuda.get_device_name(index) for index in range(len(cards))]
        assert names == [name for name, _, _ in cards]
    device = place(CARD)
    assert torch.cuda.current_device() == 0
    assert abs(free_bytes(device) - cuda_cards()[0][2]) < 512 * MIB


def test_float32_means_float32() -> None:
    device = place(CARD)
    left, right = (
        torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    there = (left.to(device) @ right.to(device)).cpu().double()
    assert (there - left.double() @ right.double()).abs().max() < 1e-3


def test_an_arena_is_zero_and_takes_its_bytes() -> None:
    device = place(CARD)
    before = free_bytes(device)
    arena = allocate_arena(device, 512 * MIB)
    synchronize(device)
    assert before - free_bytes(device) >= 500 * MIB
    assert not arena.any()


def test_memory_in_use_is_that_of_this_process() -> None:
    device = place(CARD)
    used, total = memory_use(CARD)
    arena = allocate_arena(device, 64 * MIB)
    assert memory_use(CARD) == (used + arena.nbytes, total)
    assert total == torch.cuda.mem_get_info(device)[1]


def test_an_arena_too_large_is_one_line() -> None:
    device = place(CARD)
    wanted = 2 * cuda_cards()[0][1]
    with pytest.raises(DeviceError, match="cuda:0 has no room for the KV cache") as error:
        allocate_arena(device, wanted)
    assert "\n" not in str(error.value) and f"{wanted / MIB:,.0f} MiB wanted" in str(error.value)


def test_tensors_moved_together_arrive() -> None:
    device = place(CARD)
    given = [torch.arange(n).view(-1, 1) for n in (0, 5, 70_000)]
    moved = move_together(given, device)
    assert all(tensor.device == device for tensor in moved)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(given, moved, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "deepseek_v3", "olmo2", "phi3"])
def test_everything_of_a_shard_lies_on_the_card(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    spec = ShardSpec(
        folder=str(tmp_path), dtype="float32", first_layer=0, end_layer=4, num_layers=4, tp_size=3
    )
    device = place(CARD)
    shard = load_shard(spec, device)
    tensors = {**dict(shard.model.named_parameters()), **dict(shard.model.named_buffers())}
    assert {tensor.device for tensor in tensors.values()} == {device}
    for name, kept in load_shard(spec).model.named_parameters():
        assert torch.equal(tensors[name].cpu(), kept), name


def test_a_cache_that_does_not_fit_leaves_nothing_running(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    save_tiny_model("llama", tmp_path)
    before = supervisor.pids()
    with pytest.raises(DeviceError, match="no room for the KV cache"):
        LLM(
            str(tmp_path),
            devices="cuda:0",
            dtype="float32",
            supervisor=supervisor,
            max_model_len=1 << 8,
            max_num_seqs=1 << 26,
            kv_cache_memory=4 * cuda_cards()[0][1],
        )
    assert supervisor.pids() == before


def test_a_card_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    with pytest.raises(DeviceError, match=f"CUDA card {torch.cuda.device_count()} is not there"):
        LLM(str(tmp_path), devices=f"cuda:{torch.cuda.device_count()}")


def test_cards_are_used_by_default(tmp_path: Path, supervisor: Supervisor) -> None:
    save_tiny_model("llama", tmp_path)
    with running(tmp_path, "1", supervisor, devices=None) as llm:
        assert llm.plan.ranks[0].device == "cuda:0"
