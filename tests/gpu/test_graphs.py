"""On a card: decode steps replayed as CUDA graphs give the tokens of steps that are launched."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.support import replica
from tests.support.replica import Replica
from tests.support.tiny_models import prompts, save_tiny_model

from spanwise.device.graphs import CudaRecorder, Recordings
from spanwise.device.memory import allocate_arena, move_into, place
from spanwise.model.shard import load_shard
from spanwise.runner import decode_graphs
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec

pytestmark = pytest.mark.gpu


@pytest.fixture
def card() -> torch.device:
    return place(DeviceSpec(kind="cuda"))


@pytest.fixture
def on_card(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica has its shards and arenas there."""
    monkeypatch.setattr(replica, "load_shard", partial(load_shard, device=card))
    monkeypatch.setattr(replica, "bytearray", partial(allocate_arena, card), raising=False)


@pytest.mark.usefixtures("on_card")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "phi3", "qwen3", "olmo2"])
def test_replayed_steps_give_the_same_tokens(
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decode_graphs, "LEAST_LENGTH", 16)
    monkeypatch.setattr(decode_graphs, "_LENGTH_FACTOR", 2)
    save_tiny_model(family, tmp_path)
    asked = prompts(9)
    sampling = [SamplingSpec(temperature=float(at % 3 == 2), seed=at) for at in range(len(asked))]
    launched = Replica(tmp_path)
    launched.runners[0]._graphs = None
    wanted, _ = launched.generate(asked, 40, sampling)
    with caplog.at_level(logging.WARNING):
        recorded = Replica(tmp_path)
        found, _ = recorded.generate(asked, 40, sampling)
        again, _ = recorded.generate(asked, 40, sampling)
    assert found == again == wanted
    own = recorded.runners[0]._graphs
    assert own is not None and len(own.recordings) >= 2
    assert not [one for one in caplog.records if one.name.startswith("spanwise.device.graphs")]
    own.drop()
    assert recorded.generate(asked, 40, sampling)[0] == wanted


def test_a_graph_reads_what_stands_in_its_memory(card: torch.device) -> None:
    numbers = torch.zeros(4, dtype=torch.long, device=card)
    recordings: Recordings[int] = Recordings(CudaRecorder(card))
    found = []
    for at in range(6):
        move_into((torch.arange(4) + at,), numbers)
        if recordings.takes(4):
            found.append(recordings.run(4, lambda: (numbers * 2).float()).tolist())
    assert found == [[2.0 * (at + i) for i in range(4)] for at in range(1, 6)]
    assert len(recordings) == 1


def test_what_a_card_cannot_record_is_launched(
    card: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """And it goes on computing, and recording for others."""
    given = torch.arange(4.0, device=card)

    def waits() -> torch.Tensor:
        return given * given.sum().item()

    recordings: Recordings[int] = Recordings(CudaRecorder(card))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            if recordings.takes(4):
                assert recordings.run(4, waits).tolist() == [0.0, 6.0, 12.0, 18.0]
    assert len(caplog.records) == 1 and not len(recordings)
    others: Recordings[int] = Recordings(CudaRecorder(card))
    for _ in range(3):
        if others.takes(4):
            assert others.run(4, lambda: given + 1).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert len(others) == 1


def test_graphs_share_their_memory(card: torch.device) -> None:
    """Two of one work take hardly more than one."""
    given = torch.zeros(1 << 24, device=card)
    out = torch.empty_like(given)
    recordings: Recordings[int] = Recordings(CudaRecorder(card))

    def work() -> torch.Tensor:
        return out.copy_((given + 1) * 2)

    used = []
    for shape in (1, 1, 2, 2):
        if recordings.takes(shape):
            recordings.run(shape, work)
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved(card))
    assert len(recordings) == 2
    assert used[3] - used[1] < given.nbytes
