"""Workers on cards, with stand-ins for the cards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
from tests.multi.fakes import FAKES, replica_spec
from tests.support.compare import NUM_TOKENS, reference_of
from tests.support.cpu_card import CPU_CARDS
from tests.support.layouts import running

from spanwise import SamplingParams
from spanwise.comm.nccl import connect_store
from spanwise.errors import DeviceError, ModelError
from spanwise.worker.entries import Entries
from spanwise.worker.supervisor import Supervisor


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(FAKES)
    yield made
    made.shutdown()


def test_a_card_without_room_is_one_line_and_ends_its_replica(supervisor: Supervisor) -> None:
    before = supervisor.pids()
    with pytest.raises(DeviceError, match=r"^cuda:\d has no room for the KV cache$"):
        supervisor.spawn([replica_spec(kind="cuda"), replica_spec("full", kind="cuda", tp_size=2)])
    assert supervisor.pids() == before


def test_shards_are_described_by_children_that_end(supervisor: Supervisor) -> None:
    specs = [replica_spec(f"fake-{size}").workers[0].shard for size in (1, 2)]
    before = supervisor.pids()
    assert [info.weight_bytes for info in supervisor.describe_shards(specs)] == [1 << 20, 2 << 20]
    with pytest.raises(ModelError, match="is no model folder"):
        supervisor.describe_shards([*specs, replica_spec("missing").workers[0].shard])
    assert supervisor.pids() == before


def test_an_arena_on_a_card_takes_no_memory_of_the_host(supervisor: Supervisor) -> None:
    (replica,) = supervisor.spawn([replica_spec(kind="cuda")])
    (arena_fd,) = replica._fds[1:]
    assert os.fstat(arena_fd).st_size == 0


@pytest.mark.parametrize(
    ("kind", "cards", "meets"),
    [
        ("cuda", (0, 1), True),
        ("cuda", (0, 0), False),
        ("cuda", (1,), False),
        ("cpu", (0, 1), False),
    ],
)
def test_only_ranks_with_a_card_each_are_joined_by_nccl(
    kind: str, cards: tuple[int, ...], meets: bool
) -> None:
    spec = replica_spec(kind=kind, tp_size=len(cards))
    devices = [
        msgspec.structs.replace(worker.device, index=card)
        for worker, card in zip(spec.workers, cards, strict=True)
    ]
    workers = tuple(
        msgspec.structs.replace(worker, device=device)
        for worker, device in zip(spec.workers, devices, strict=True)
    )
    assert replace(spec, workers=workers).has_own_cards is meets


def test_ranks_with_a_card_each_meet_at_a_store_that_ends_after_them() -> None:
    """The store is the real one; that there are no cards does not matter to it."""
    names = msgspec.structs.asdict(FAKES) | {"store": Entries().store}
    own = Supervisor(Entries(**names))
    try:
        (replica,) = own.spawn([replica_spec(kind="cuda", tp_size=2)])
        assert replica.store is not None and replica.store.pid in own.pids()
        connections = psutil.Process(replica.store.pid).net_connections("tcp")
        (listening,) = (each for each in connections if each.status == psutil.CONN_LISTEN)
        assert listening.laddr.ip == "127.0.0.1"
        connect_store(listening.laddr.port, 10.0).set("rank 0", "came")
        replica.workers[0].close()  # a rank is gone, the store is not
        assert connect_store(listening.laddr.port, 10.0).get("rank 0") == b"came"
        store = replica.store
        replica.close(1.0)
        assert not store.is_alive()
    finally:
        own.shutdown()


@pytest.fixture(scope="module")
def with_cards() -> Iterator[Supervisor]:
    made = Supervisor(CPU_CARDS)
    yield made
    made.shutdown()


@pytest.mark.parametrize(
    ("layout", "cards"), [("1", "cuda:0"), ("tp2", "cuda:0*2"), ("tp2-pp2", "cuda:0*2,1*2")]
)
def test_from_prompt_to_tokens_as_on_cards(
    layout: str,
    cards: str,
    models: Path,
    with_cards: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole way of a CUDA rank with the CPU as its card: describe, size, load, arena, step."""
    there = [("card", 8 << 30, 6 << 30)] * 2
    monkeypatch.setattr("spanwise.device.devices.cuda_cards", lambda: there)
    monkeypatch.setattr("spanwise.engine.language_launch.cuda_cards", lambda: there)
    right = reference_of("qwen3_moe", models)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    before = with_cards.pids()
    with running(right.folder, layout, with_cards, devices=cards) as llm:
        assert all(rank.device.startswith("cuda") for rank in llm.plan.ranks)
        outputs = llm.generate([{"prompt_token_ids": p} for p in right.prompts], params)
    assert [list(output.outputs[0].token_ids) for output in outputs] == right.tokens
    assert with_cards.pids() == before


def test_weights_too_large_for_a_card_are_refused_before_they_are_loaded(
    models: Path, with_cards: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [("card", 8 << 30, 1 << 30)]
    monkeypatch.setattr("spanwise.device.devices.cuda_cards", lambda: there)
    monkeypatch.setattr("spanwise.engine.language_launch.cuda_cards", lambda: there)
    right = reference_of("qwen3_moe", models)
    before = with_cards.pids()
    with (
        pytest.raises(DeviceError, match="cuda:0 has 1,024 MiB free, too little"),
        running(right.folder, "1", with_cards, devices="cuda:0"),
    ):
        raise AssertionError("it started")
    assert with_cards.pids() == before
