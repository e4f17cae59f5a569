"""A sampled step on a card goes there in one copy and comes back in one, with the same tokens.

No card is at hand: the meta device stands in for one where copies and waits are counted, and what
a card computes is computed on the CPU where numbers are compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cpu.test_other_device import cache_of
from tests.support.one_device import CARD, OneDevice
from tests.support.shards import shard_specs
from tests.support.tiny_models import save_tiny_model

from spanwise.comm.communicator import RankComm
from spanwise.comm.single import SingleCommunicator
from spanwise.cost.memory import arena_bytes
from spanwise.device.memory import allocate_arena
from spanwise.model.shard import load_shard
from spanwise.runner import mass, sampling
from spanwise.runner.logprobs import prompt_logprobs
from spanwise.runner.runner import Runner
from spanwise.runner.sampling import SampleRow, sample
from spanwise.types.plan import LanePlan, NewSequence, Row, StepPlan
from spanwise.types.sampling import SamplingSpec
from spanwise.types.worker import DeviceSpec, RankPlace, WorkerSpec

_ATEN = torch.ops.aten
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
    "logit_bias": {3: 2.0, 5: -1.0},
    "min_tokens": 9,
    "stop_token_ids": (2, 7),
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.1,
    "logprobs": 3,
}


class TwoWays(OneDevice):
    """Lets tensors back to the host, and counts them; what picks by values is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.num_fetched = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        assert func is not _ATEN.nonzero_numpy.default, "how many there are is known there only"
        wanted = kwargs or {}
        is_fetched = func is _ATEN._to_copy.default and args[0].device == CARD
        if is_fetched and torch.device(wanted.get("device", CARD)).type == "cpu":
            self.num_fetched += 1
            return torch.zeros(args[0].shape, dtype=wanted.get("dtype", args[0].dtype))
        return super().__torch_dispatch__(func, types, args, kwargs)


def row_of(allowed: bytes | None = None, **options: Any) -> SampleRow:
    return SampleRow(SamplingSpec(**options), 6, (1, 4, 4, 9, 4, 9), 2, allowed)


def mask(vocab_size: int) -> bytes:
    return bytes([0b10110101] * -(-vocab_size // 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*EVERYTHING, "all", "mask", "mixed", "slabs"])
def test_a_sampled_step_is_one_copy_in_and_one_out(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 101
    drawn = {"temperature": 1.0, "seed": 3}
    rows = [row_of(**drawn)] * 3
    if name in EVERYTHING:
        rows += [row_of(**{**drawn, name: EVERYTHING[name]})]
    elif name != "mask":
        rows += [row_of(mask(vocab), **EVERYTHING), row_of(**EVERYTHING)]
    if name in ("mask", "mixed"):
        rows += [row_of(mask(vocab)), row_of(), row_of(logprobs=0)]
    if name == "slabs":
        monkeypatch.setattr(mass, "_CARD_SLAB", 2 * vocab)
    with TwoWays() as watch:
        tokens, logprobs = sample(torch.empty(len(rows), vocab, dtype=dtype, device=CARD), rows)
    assert (watch.num_copies, watch.num_fetched) == (1, 1)
    assert len(tokens) == len(logprobs) == len(rows)


def test_a_greedy_step_is_one_copy_out() -> None:
    with TwoWays() as watch:
        sample(torch.empty(4, 101, device=CARD), [row_of()] * 4)
    assert (watch.num_copies, watch.num_fetched) == (0, 1)


def test_a_scored_prompt_is_one_copy_each_way() -> None:
    with TwoWays() as watch:
        prompt_logprobs(torch.empty(4, 101, device=CARD), [1, 2, 3, 4], 2)
    assert (watch.num_copies, watch.num_fetched) == (1, 1)


@pytest.mark.parametrize(
    "picked", [lambda x: x[x > 0], lambda x: x.nonzero(as_tuple=True), lambda x: bool(x.any())]
)
def test_the_watch_sees_what_waits(picked: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), TwoWays():
        picked(torch.empty(4, device=CARD))


def test_a_runner_copies_twice_and_waits_once_in_a_step(tmp_path: Path) -> None:
    """Its indices, then what the rows ask; the tokens come back."""
    save_tiny_model("llama", tmp_path)
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
    runner = Runner(shard, worker, RankComm(tp=SingleCommunicator()), arena)
    blocks = tuple((0, 1, 2, 3) for _ in cache.groups)
    none: tuple[tuple[int, ...], ...] = ((),) * len(cache.groups)
    sampling = SamplingSpec(**EVERYTHING)
    new = tuple(NewSequence(at, tuple(range(3, 11)), 5, sampling) for at in range(3))
    for step in range(4):
        own = blocks if step == 0 else none
        rows = tuple(Row(at, 7 + step, 1, 8 + step, own, True) for at in range(3))
        with TwoWays() as watch:
            result = runner.execute(
                StepPlan(0, step, (LanePlan(new=() if step else new, rows=rows),))
            )
        assert result is not None and len(result.lanes[0].sampled) == 3
        assert (watch.num_copies, watch.num_fetched) == (2, 1)


def mixed_rows(vocab: int) -> list[SampleRow]:
    draw = random.Random(3)
    rows = []
    for number in range(80):
        options = {name: value for name, value in EVERYTHING.items() if draw.random() < 0.4}
        top_k = draw.choice([0, 1, 7, vocab - 1, vocab, 10 * vocab])
        options |= {"seed": number, "top_k": top_k, "top_p": draw.choice([1.0, 1.0, 1e-9, 0.6])}
        rows.append(row_of(mask(vocab) if number % 7 == 0 else None, **options))
    return rows


@pytest.mark.parametrize("vocab", [37, 1013])
@pytest.mark.parametrize("spread", [0.0, 1.0, 9.0])
def test_whole_rows_give_what_picking_gives(
    vocab: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, rows with nothing left and impossible tokens among them."""
    rows = mixed_rows(vocab)
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(1)) * spread
    logits[::5, ::3] = -torch.inf
    logits[4], logits[9] = -torch.inf, logits[9].round()
    wanted = sample(logits, rows)
    asked: list[torch.device] = []
    monkeypatch.setattr(sampling, "_picks", lambda device: asked.append(device))
    assert sample(logits, rows) == wanted
    assert asked
