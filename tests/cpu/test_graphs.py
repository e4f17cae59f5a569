"""Recorded decode steps give the tokens of steps that are not; the recorder stands for a card's."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cpu.test_other_device import Seen, cache_of
from tests.support.one_device import CARD, OneDevice
from tests.support.recorders import Rerun, Tape
from tests.support.replica import MAX_LEN, Replica
from tests.support.shards import shard_specs
from tests.support.tiny_models import prompts, save_tiny_model

from spanwise.comm.communicator import RankComm
from spanwise.comm.single import SingleCommunicator
from spanwise.cost.memory import arena_bytes
from spanwise.device import graphs, native
from spanwise.device.graphs import Recordings, recorder_of
from spanwise.device.memory import allocate_arena, move_into
from spanwise.errors import WaitInterruptedError
from spanwise.model.shard import Shard, load_shard
from spanwise.runner import decode_graphs, runner
from spanwise.runner.decode_graphs import MOST_ROWS, filled_history, filled_rows
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.plan import LanePlan, NewSequence, Row, StepPlan
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec, RankPlace, WorkerSpec

CPU = torch.device("cpu")
# Dense ones, of every kind of layer that is recorded: windows, softcap, sinks come with the last.
FAMILIES = ["llama", "gpt2", "mistral", "gemma2", "phi3", "qwen3", "olmo2"]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    """Those of all runners, which record from here on; short histories, so that several come."""
    made: list[Rerun] = []

    def of(_: torch.device) -> Rerun:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(runner, "recorder_of", of)
    monkeypatch.setattr(native, "loaded", lambda: None)  # out of a tape's sight
    monkeypatch.setattr(decode_graphs, "LEAST_LENGTH", 16)
    monkeypatch.setattr(decode_graphs, "_LENGTH_FACTOR", 2)
    return made


def ask(replica: Replica, wanted: Sequence[tuple[list[int], int, SamplingSpec]]) -> list[list[int]]:
    """Each its own number of tokens; a new one comes with every other step."""
    tokens: list[list[int]] = [[] for _ in wanted]
    waiting = [
        SequenceRequest(
            sequence_id=at, prompt_token_ids=tuple(prompt), sampling=spec, max_tokens=count
        )
        for at, (prompt, count, spec) in enumerate(wanted)
    ]
    scheduler, turn = replica.scheduler, 0
    while waiting or scheduler.num_waiting or scheduler.num_running:
        if waiting and turn % 2 == 0:
            scheduler.add(waiting.pop(0))
        turn += 1
        plans = []
        while (plan := scheduler.next_plan()) is not None:
            plans.append(plan)
        for result in replica._execute(plans):
            for update in scheduler.accept(result):
                tokens[update.sequence_id] += update.token_ids
    return tokens


def mixed() -> list[tuple[list[int], int, SamplingSpec]]:
    """Prompts and answers of many lengths, greedy and drawn."""
    draw = random.Random(0)
    asked = prompts(12)
    drawn = SamplingSpec(temperature=1.0, top_p=0.9, seed=7)
    return [
        (prompt, draw.randint(2, MAX_LEN - len(prompt)), drawn if at % 3 == 2 else SamplingSpec())
        for at, prompt in enumerate(asked)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_the_same_tokens(
    family: str, tmp_path: Path, recorders: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(family, tmp_path)
    with monkeypatch.context() as eager:
        eager.setattr(runner, "recorder_of", recorder_of)
        wanted = ask(Replica(tmp_path), mixed())
    assert not recorders
    assert ask(Replica(tmp_path), mixed()) == wanted
    (recorder,) = recorders
    assert recorder.num_recorded >= 5
    assert recorder.num_replayed - recorder.num_recorded > 50
    assert not recorder.num_dropped


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (1, 2), (2, 2)])
def test_recorded_steps_of_several_ranks(
    pp: int, tp: int, tmp_path: Path, recorders: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path)
    with monkeypatch.context() as eager:
        eager.setattr(runner, "recorder_of", recorder_of)
        wanted = ask(Replica(tmp_path), mixed())
    if tp > 1:  # shared memory is out of a tape's sight
        monkeypatch.setattr(Tape, "_again", Rerun._again)
        monkeypatch.setattr(runner, "_records_collectives", lambda _: True)
    assert ask(Replica(tmp_path, pp=pp, tp=tp), mixed()) == wanted
    assert len(recorders) == pp * tp
    assert all(one.num_replayed > one.num_recorded > 1 for one in recorders)
    assert len({one.num_recorded for one in recorders[:tp]}) == 1


def test_filled_rows_change_no_page_of_another(tmp_path: Path, recorders: list[Rerun]) -> None:
    """The pages after some steps are those of steps that were not recorded, in every slot."""
    save_tiny_model("llama", tmp_path)

    def pages(replica: Replica) -> list[torch.Tensor]:
        ask(replica, [(prompt, 20, SamplingSpec()) for prompt in prompts(5)])
        stores: list[Any] = [one.store for one in replica.shards[0]._attention.values()]
        return [part for store in stores for part in (store.keys, store.values)]

    found = pages(Replica(tmp_path))
    assert recorders[0].num_replayed
    del recorders[:]
    plain = Replica(tmp_path)
    plain.runners[0]._graphs = None
    for one, other in zip(found, pages(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_what_the_host_decides_is_not_recorded(
    family: str, tmp_path: Path, recorders: list[Rerun]
) -> None:
    save_tiny_model(family, tmp_path)
    assert Replica(tmp_path).runners[0]._graphs is None


def test_ranks_joined_by_the_host_are_not_recorded(tmp_path: Path, recorders: list[Rerun]) -> None:
    save_tiny_model("llama", tmp_path)
    replica = Replica(tmp_path, tp=2)
    assert all(one._graphs is None for one in replica.runners)


def test_scores_and_pooling_go_their_own_way(tmp_path: Path, recorders: list[Rerun]) -> None:
    """In steps of one token a row, too: the last chunk of a prompt is one."""
    save_tiny_model("llama", tmp_path)
    prompt = tuple(prompts()[7][:17])

    def answers(replica: Replica) -> list[Any]:
        scored = SamplingSpec(prompt_logprobs=2)
        scheduler, given = replica.scheduler, []
        for at in range(4):
            scheduler.add(
                SequenceRequest(sequence_id=2 * at, prompt_token_ids=prompt, task="pool_last")
            )
            scheduler.add(
                SequenceRequest(
                    sequence_id=2 * at + 1, prompt_token_ids=prompt, sampling=scored, max_tokens=3
                )
            )
            while scheduler.num_waiting or scheduler.num_running:
                plans = []
                while (plan := scheduler.next_plan()) is not None:
                    plans.append(plan)
                for result in replica._execute(plans):
                    for update in scheduler.accept(result):
                        ids = [one.token_id for one in update.prompt_logprobs]
                        given.append((update.sequence_id, update.token_ids, ids, update.pooled))
        return given

    with_graphs = answers(Replica(tmp_path, max_step_tokens=16))
    plain = Replica(tmp_path, max_step_tokens=16)
    plain.runners[0]._graphs = None
    for one, other in zip(with_graphs, answers(plain), strict=True):
        assert one[:3] == other[:3]
        assert one[3] == (None if other[3] is None else pytest.approx(other[3], abs=1e-5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_stays_on_its_device(
    family: str, tmp_path: Path, recorders: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes its numbers there in one copy: nothing else comes from the host."""
    # Nothing has a value there.
    monkeypatch.setattr(Tape, "_again", Rerun._again)
    monkeypatch.setattr(graphs, "_is_close", lambda *_: True)
    save_tiny_model(family, tmp_path)
    spec = shard_specs(tmp_path)[0]
    shard = load_shard(spec, CARD)
    cache = cache_of(shard, tmp_path)
    worker = WorkerSpec(
        place=RankPlace(),
        device=DeviceSpec(kind="cuda"),
        shard=spec,
        cache=cache,
        epoch=0,
        max_step_tokens=32,
        max_in_flight=2,
        max_model_len=64,
    )
    arena = allocate_arena(CARD, arena_bytes(shard.layer_caches, 4, cache))
    rank = Seen(shard, worker, RankComm(tp=SingleCommunicator()), arena)
    blocks = tuple((0, 1, 2, 3) for _ in cache.groups)
    none: tuple[tuple[int, ...], ...] = ((),) * len(cache.groups)
    new = tuple(NewSequence(at, tuple(range(3, 15)), 5, SamplingSpec()) for at in range(3))
    with OneDevice() as watch:
        for step in range(5):
            own = blocks if step == 0 else none
            rows = tuple(Row(at, 7 + step, 1, 8 + step, own, True) for at in range(3))
            rank.execute(StepPlan(0, step, (LanePlan(new=() if step else new, rows=rows),)))
    assert watch.num_copies == 5
    assert recorders[0].num_recorded == 1 and recorders[0].num_replayed == 4
    assert rank.logits.shape[0] == 3


@given(st.integers(1, MOST_ROWS), st.integers(1, 100_000))
def test_filled_sizes(rows: int, length: int) -> None:
    assert rows <= filled_rows(rows) <= min(MOST_ROWS, max(8, 2 * rows))
    assert filled_rows(filled_rows(rows)) == filled_rows(rows)
    filled = filled_history(length, 100_000)
    assert length <= filled <= 100_000 and (filled <= 512 or filled < 4 * length)
    assert [filled_rows(n) for n in (1, 2, 3, 5, 9, 17, 25, 33)] == [1, 2, 4, 8, 16, 24, 32, 40]


def test_numbers_go_to_one_place_in_order() -> None:
    out = torch.zeros(6, dtype=torch.long)
    move_into((torch.tensor([1, 2]), torch.tensor([[3], [4]]), torch.tensor([5, 6])), out)
    assert out.tolist() == [1, 2, 3, 4, 5, 6]


# --- recordings themselves


class Work:
    """Doubles what stands in its input."""

    def __init__(self) -> None:
        self.given = torch.zeros(2)
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return self.given * 2


def runs(recordings: Recordings[str], work: Work, times: int, shape: str = "a") -> list[float]:
    """What was found, by a recording or without."""
    found = []
    for at in range(times):
        work.given.fill_(at + 1)
        taken = recordings.takes(shape)
        found.append((recordings.run(shape, work) if taken else work())[0].item())
    return found


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    recorder, work = Tape(), Work()
    recordings: Recordings[str] = Recordings(recorder)
    assert runs(recordings, work, 1) == [2] and not recorder.num_recorded
    assert runs(recordings, work, 4) == [2, 4, 6, 8]
    assert recorder.num_recorded == 1 and len(recordings) == 1
    assert work.count == 3, "once by itself, once to warm up, once to record"


def refuse(_: Work) -> torch.Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def another(_: Work) -> torch.Tensor:
    return torch.full((2,), 3.0)


def nothing(_: Work) -> torch.Tensor:
    return torch.full((2,), torch.nan)


class Faulty(Rerun):
    """Records, or replays, something else."""

    def __init__(self, fault: Callable[[Work], torch.Tensor]) -> None:
        super().__init__()
        self._fault = fault

    def record(self, compute: Any) -> Any:
        if self._fault is refuse:
            self._fault(compute)
        return lambda: self._fault(compute)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(refuse, "not permitted"), (another, "other values"), (nothing, "other values")],
)
def test_what_cannot_be_recorded_is_said_once(
    fault: Callable[[Work], torch.Tensor], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    recordings: Recordings[str] = Recordings(Faulty(fault))
    with caplog.at_level(logging.WARNING):
        assert runs(recordings, Work(), 5) == [2, 4, 6, 8, 10]
        assert runs(recordings, Work(), 3, "b") == [2, 4, 6]
    assert not len(recordings)
    assert len(caplog.records) == 1 and said in caplog.text


def test_ranks_record_together_or_not_at_all(caplog: pytest.LogCaptureFixture) -> None:
    said: list[bool] = []

    def agree(is_so: bool) -> bool:
        said.append(is_so)
        return len(said) < 2

    recordings: Recordings[str] = Recordings(Tape(), agree)
    with caplog.at_level(logging.WARNING):
        assert runs(recordings, Work(), 4) == [2, 4, 6, 8]
    assert said == [True, True] and not len(recordings)
    assert "another rank" in caplog.text


def test_without_room_what_there_is_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, work = Tape(), Work()
    recordings: Recordings[str] = Recordings(recorder)
    runs(recordings, work, 3)
    recorder.room = False
    assert runs(recordings, work, 4, "b") == [2, 4, 6, 8]
    assert recordings.takes("a") and not recordings.takes("b") and len(recordings) == 1
    recordings.drop()
    recorder.room = True
    monkeypatch.setattr(graphs, "_MOST_S", 0.0)
    assert runs(recordings, work, 4) == [2, 4, 6, 8] and not len(recordings)


def test_an_interruption_is_none_of_its_faults() -> None:
    class Interrupted(Rerun):
        def record(self, compute: Any) -> Any:
            raise WaitInterruptedError("all_gather was interrupted")

    with pytest.raises(WaitInterruptedError):
        runs(Recordings(Interrupted()), Work(), 2)


def test_after_a_drop_shapes_are_recorded_anew(tmp_path: Path, recorders: list[Rerun]) -> None:
    save_tiny_model("llama", tmp_path)
    replica = Replica(tmp_path)
    asked = [(prompt, 12, SamplingSpec()) for prompt in prompts(4)]
    first = ask(replica, asked)
    own = replica.runners[0]._graphs
    assert own is not None and len(own.recordings)
    own.drop()
    assert not len(own.recordings) and recorders[0].num_dropped == 1
    before = recorders[0].num_recorded
    assert ask(Replica(tmp_path), asked) == first
    assert ask(replica, asked) == first
    assert recorders[0].num_recorded > before


def test_the_cpu_records_nothing(tmp_path: Path) -> None:
    assert recorder_of(CPU) is None
    save_tiny_model("llama", tmp_path)
    shards: list[Shard] = []
    replica = Replica(tmp_path, spoil=shards.append)
    assert shards[0].is_recordable and replica.runners[0]._graphs is None
