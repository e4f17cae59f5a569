"""The CUDA path as far as it goes without a card: the CPU, gloo and errors stand in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.gloo_as_nccl import GlooAsNccl
from tests.support.tiny_models import save_tiny_model

from spanwise.comm.communicator import RankComm
from spanwise.comm.nccl import serve_store
from spanwise.comm.store import listen_on_loopback
from spanwise.device import devices, memory
from spanwise.device.devices import cuda_capabilities, cuda_cards, parse_devices
from spanwise.device.memory import allocate_arena, claiming, move_together, place
from spanwise.errors import DeviceError
from spanwise.types.cache import CacheLayout
from spanwise.types.worker import DeviceSpec, RankPlace, ShardSpec, WorkerSpec
from spanwise.worker.card import start_on_card
from spanwise.worker.rank_comm import open_comm

CPU = torch.device("cpu")


def spec_of(
    folder: Path | str, pp: int = 1, tp: int = 1, rank: int = 0, port: int = 0
) -> WorkerSpec:
    stage, tp_rank = divmod(rank, tp)
    return WorkerSpec(
        place=RankPlace(pp=stage, tp=tp_rank),
        device=DeviceSpec(kind="cpu"),
        shard=ShardSpec(
            folder=str(folder),
            dtype="float32",
            first_layer=0,
            end_layer=4,
            num_layers=4,
            pp_rank=stage,
            pp_size=pp,
            tp_rank=tp_rank,
            tp_size=tp,
        ),
        cache=CacheLayout(block_size=4, groups=()),
        epoch=3,
        max_step_tokens=8,
        max_in_flight=2,
        max_model_len=8,
        store_port=port,
    )


# --- memory


def test_a_card_that_torch_cannot_use_is_one_line() -> None:
    if torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cuda:99 cannot be used"):
            place(DeviceSpec(kind="cuda", index=99))
        return
    with pytest.raises(DeviceError, match=r"^cuda:0 cannot be used by torch .*--devices cpu$"):
        place(DeviceSpec(kind="cuda"))


def test_memory_that_runs_out_names_what_was_wanted_and_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 100 << 20)
    with (
        pytest.raises(DeviceError, match="cpu has no room for the cache: 300 MiB wanted, 100 MiB"),
        claiming(CPU, 300 << 20, "the cache"),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 2 MiB.\nMore lines")


def test_an_arena_is_bytes_of_zero() -> None:
    arena = allocate_arena(CPU, 1000)
    assert arena.dtype == torch.uint8 and arena.shape == (1000,) and not arena.any()


def test_tensors_moved_together_keep_shape_and_values() -> None:
    given = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.long), torch.tensor(7)]
    moved = move_together(given, CPU)
    assert all(torch.equal(one, other) for one, other in zip(given, moved, strict=True))
    assert {t.untyped_storage().data_ptr() for t in moved} != {given[0].data_ptr()}


def test_a_rank_starts_on_its_device_with_shard_and_arena(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    shard, arena = start_on_card(spec_of(tmp_path), 4096)
    assert shard.info().weight_bytes > 0
    # What was packed is let go as it was loaded.
    held = {t.device for t in shard.model.parameters() if not t.is_meta}
    assert held == {CPU} == {t.device for t in shard.model.buffers()}
    assert arena.nbytes == 4096


# --- communicators


def test_ranks_with_a_store_join_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", GlooAsNccl, raising=False)
    listener = listen_on_loopback()
    port = listener.getsockname()[1]
    store = serve_store(listener)

    def join(rank: int) -> RankComm:
        return open_comm(-1, spec_of("", 2, 2, rank, port), False)

    def run(rank: int) -> torch.Tensor:
        comm = comms[rank]
        hidden = comm.tp.all_reduce(torch.full((3,), float(rank)))
        if comm.outbox is not None:
            comm.outbox.send(hidden)
            assert comm.tokens is not None
            return comm.tokens.recv(torch.empty(1, dtype=torch.long))
        assert comm.inbox is not None and comm.tokens is not None
        comm.tokens.send(torch.tensor([40 + rank]))
        return comm.inbox.recv(torch.empty(3)) + hidden

    with ThreadPoolExecutor(4) as pool:
        comms = list(pool.map(join, range(4)))
        results = [result.tolist() for result in pool.map(run, range(4))]
    assert results == [[42], [43], [6.0] * 3, [6.0] * 3]
    assert store.port == port


# --- which cards there are


class _Driver:
    """Three cards in the order of the bus, each its number in free bytes."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    nvmlDeviceGetCount = staticmethod(lambda: 3)  # noqa: N815
    nvmlDeviceGetHandleByIndex = staticmethod(int)  # noqa: N815
    nvmlDeviceGetUUID = staticmethod(lambda card: f"GPU-{'abc'[card]}-1")  # noqa: N815
    nvmlDeviceGetName = staticmethod(lambda card: f"card {card}")  # noqa: N815

    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda card: [8, card])  # noqa: N815

    @staticmethod
    def nvmlDeviceGetMemoryInfo(card: int) -> Any:  # noqa: N802
        return type("Memory", (), {"total": 9, "free": card})


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("", []),
        ("1,7,0", [1]),
        ("GPU-c", [2]),
        ("GPU-b-1,0", [1, 0]),
        ("-1", []),
    ],
)
def test_cards_are_counted_as_cuda_counts_them(
    visible: str | None, cards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "pynvml", _Driver())
    monkeypatch.setattr(devices, "_torch_build", lambda: "2.13.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [free for _, _, free in cuda_cards()] == cards
    assert cuda_capabilities() == [(8, card) for card in cards]
    assert len(parse_devices(None, 1)) == max(1, len(cards))


def test_a_torch_without_cuda_has_no_cards_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "pynvml", _Driver())
    monkeypatch.setattr(devices, "_torch_build", lambda: "2.13.0+cpu")
    assert [device.kind for device in parse_devices(None)] == ["cpu"]
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match=r"torch 2\.13\.0\+cpu, a build without CUDA"):
            parse_devices(wanted)
