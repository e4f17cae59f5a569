"""A step on a device that is not the CPU: nothing of it may be left behind on the host.

Stands in for a card where there is none (the tests in tests/gpu need one).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.one_device import CARD, OneDevice, OneOfMany, WatchedLink
from tests.support.shards import shard_specs
from tests.support.tiny_models import FAMILIES, MIXTURES, save_tiny_model

from spanwise.comm.communicator import RankComm
from spanwise.cost.memory import CacheWish, RankMemory, arena_bytes, size_cache
from spanwise.device.memory import allocate_arena
from spanwise.model.facts import describe
from spanwise.model.shard import Shard, load_shard
from spanwise.runner.rows import WantedLogits
from spanwise.runner.runner import Runner
from spanwise.types.cache import CacheLayout
from spanwise.types.plan import LanePlan, LaneResult, NewSequence, Row, StepPlan
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec, RankPlace, WorkerSpec

NUM_TOKENS = 9


class Seen(Runner):
    """A runner that keeps the logits instead of drawing from them: their values are not there."""

    def _sample(self, logits: torch.Tensor, wanted: list[WantedLogits]) -> LaneResult:
        self.logits = logits
        return LaneResult()


def cache_of(shard: Shard, folder: Path) -> CacheLayout:
    memory = RankMemory(
        name="card", layer_caches=shard.layer_caches, value_bytes=4, available_bytes=1 << 26
    )
    wish = CacheWish(block_size=4, max_num_seqs=4, max_model_len=64, max_step_tokens=32)
    return size_cache(describe(str(folder), "float32").layer_caches, [memory], wish)


def plan(step: int, cache: CacheLayout, start: int, count: int) -> StepPlan:
    """Two sequences; the first time with all their blocks."""
    blocks = tuple((0, 1, 2, 3) for _ in cache.groups) if step == 0 else ((),) * len(cache.groups)
    known = tuple(range(3, 3 + NUM_TOKENS))
    new = tuple(NewSequence(i, known, 5, SamplingSpec()) for i in range(2)) if step == 0 else ()
    rows = tuple(Row(i, start, count, start + count, blocks, False) for i in range(2))
    return StepPlan(0, step, (LanePlan(new=new, rows=rows),))


LAYOUTS = {"1": (1, 1, False), "tp3": (1, 3, False), "ep2": (1, 2, True), "pp2": (2, 1, False)}
CASES = [
    ("llama", "1"),
    *((family, "tp3") for family in FAMILIES),
    *((family, "ep2") for family in MIXTURES),
    *((family, "pp2") for family in ("llama", "gpt2", "phi3", "gpt_oss", "deepseek_v3")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        # Two, so that three ranks share KV heads: heads then read them by an index.
        changes = {} if family == "deepseek_v3" else {"num_key_value_heads": 2}
        save_tiny_model(family, folder, **changes)
    return folders


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_step_stays_on_its_device(family: str, layout: str, folders: dict[str, Path]) -> None:
    pp, tp, experts = LAYOUTS[layout]
    for pp_rank in range(pp):
        spec = shard_specs(folders[family], pp, tp, experts)[pp_rank * tp + tp // 2]
        shard = load_shard(spec, CARD)
        assert {t.device for t in (*shard.model.parameters(), *shard.model.buffers())} == {CARD}
        handed_on: list[torch.Tensor] = []
        link = WatchedLink(handed_on.append)
        comm = RankComm(
            tp=OneOfMany(tp // 2, tp),
            inbox=link if pp_rank > 0 else None,
            outbox=link if pp_rank < pp - 1 else None,
        )
        cache = cache_of(shard, folders[family])
        worker = WorkerSpec(
            place=RankPlace(pp=pp_rank, tp=tp // 2),
            device=DeviceSpec(kind="cuda"),
            shard=spec,
            cache=cache,
            epoch=0,
            max_step_tokens=32,
            max_in_flight=2,
            max_model_len=64,
        )
        arena = allocate_arena(CARD, arena_bytes(shard.layer_caches, 4, cache))
        runner = Seen(shard, worker, comm, arena)
        with OneDevice() as watch:
            runner.execute(plan(0, cache, 0, NUM_TOKENS - 1))
            runner.execute(plan(1, cache, NUM_TOKENS - 1, 1))
        assert watch.num_copies == 2, "each step brings its indices to the card at once"
        result = handed_on[-1] if comm.outbox is not None else runner.logits
        assert result.device == CARD
        assert len(handed_on) == (2 if comm.outbox is not None else 0)


def test_the_watch_sees_what_was_left_behind(folders: dict[str, Path]) -> None:
    shard = load_shard(shard_specs(folders["llama"])[0], CARD)
    norm = shard.model.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(torch.ones(48), requires_grad=False)
    with pytest.raises(AssertionError, match="tensors on"), OneDevice():
        norm(torch.empty(1, 2, 48, device=CARD))
