"""The exactness suite has teeth: each planted error changes tokens of the tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.support.compare import LOGIT_TOLERANCE, NUM_TOKENS, reference_of, worst_difference
from tests.support.replica import Replica
from tests.support.tiny_models import VOCAB

from spanwise.model.attention import LayerAttention
from spanwise.model.batch import StepBatch
from spanwise.model.parallel import RowParallel
from spanwise.model.shard import Shard
from spanwise.runner.rows import BatchBuilder
from spanwise.types.model import ModelFacts
from spanwise.types.sampling import SamplingSpec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("models")


def verdict(family: str, root: Path, **options: Any) -> tuple[int, float]:
    """How many prompts' tokens differ from transformers', and the worst logprob difference."""
    right = reference_of(family, root)
    sampling = [SamplingSpec(logprobs=VOCAB)] * len(right.prompts)
    tokens, logprobs = Replica(right.folder, **options).generate(
        right.prompts, NUM_TOKENS, sampling
    )
    wrong = sum(ours != wanted for ours, wanted in zip(tokens, right.tokens, strict=True))
    return wrong, worst_difference(tokens, logprobs, right)


def fails(found: tuple[int, float]) -> bool:
    """What the exactness suite asserts, the other way round."""
    wrong, worst = found
    return wrong > 0 and worst > LOGIT_TOLERANCE


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral", "gpt2", "mixtral"])
def test_the_unspoilt_model_passes(family: str, tp: int, root: Path) -> None:
    wrong, worst = verdict(family, root, tp=tp)
    assert wrong == 0
    assert worst < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_a_bias_added_on_every_rank(
    family: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RowParallel.__call__

    def twice(self: RowParallel, hidden: torch.Tensor) -> torch.Tensor:
        bias = self.module.bias
        out = right(self, hidden)
        return out + bias if isinstance(bias, torch.Tensor) else out

    monkeypatch.setattr(RowParallel, "__call__", twice)
    assert fails(verdict(family, root, tp=2))


def without_windows(facts: ModelFacts) -> ModelFacts:
    caches = tuple(
        msgspec.structs.replace(cache, kind="full", window=0) for cache in facts.layer_caches
    )
    return msgspec.structs.replace(facts, layer_caches=caches)


def forget_window(shard: Shard) -> None:
    for handler in shard._attention.values():
        handler.spec = msgspec.structs.replace(handler.spec, window=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_the_window_off(family: str, root: Path) -> None:
    assert fails(verdict(family, root, spoil=forget_window, facts=without_windows))


Given = torch.Tensor | float | None


def attending(forced: Callable[[Given, Given, Given], tuple[Given, Given, Given]]) -> Any:
    """The attention with other values for scaling, soft cap and sinks."""
    right = LayerAttention.attend_tokens

    def attend_tokens(
        self: LayerAttention, query: torch.Tensor, scaling: Any, softcap: Any, sinks: Any
    ) -> torch.Tensor:
        given: Any = forced(scaling, softcap, sinks)
        return right(self, query, *given)

    return attend_tokens


def test_the_soft_cap_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = attending(lambda scaling, softcap, sinks: (scaling, None, sinks))
    monkeypatch.setattr(LayerAttention, "attend_tokens", wrong)
    assert fails(verdict("gemma2", root))


def test_the_sinks_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = attending(lambda scaling, softcap, sinks: (scaling, softcap, None))
    monkeypatch.setattr(LayerAttention, "attend_tokens", wrong)
    assert fails(verdict("gpt_oss", root))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_positions_one_too_high(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on: rotary positions only count against one another."""
    right = BatchBuilder.build

    def build(self: BatchBuilder, *args: Any) -> Any:
        batch, wanted = right(self, *args)
        late = torch.cat([torch.full((w.row.count,), int(w.row.start > 0)) for w in wanted])
        return replaced(batch, positions=batch.positions + late), wanted

    monkeypatch.setattr(BatchBuilder, "build", build)
    assert fails(verdict(family, root))


def replaced(batch: StepBatch, **changes: Any) -> StepBatch:
    return StepBatch(**{**batch.__dict__, **changes})


def swap_experts(shard: Shard) -> None:
    name = next(iter(shard.cut.experts))
    module = shard.model.get_submodule(name)
    for parameter in module.parameters(recurse=False):
        parameter.data[[0, 1]] = parameter.data[[1, 0]].clone()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_two_experts_swapped_in_one_layer(family: str, root: Path) -> None:
    assert fails(verdict(family, root, spoil=swap_experts))


def read_the_neighbours_head(shard: Shard) -> None:
    handler = next(iter(shard._attention.values()))
    heads = handler.spec.num_heads
    group = 8 // 4
    handler.kv_index = torch.arange(heads * group) // group
    handler.kv_index[0] = 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_one_kv_head_read_from_its_neighbour(family: str, root: Path) -> None:
    assert fails(verdict(family, root, spoil=read_the_neighbours_head))
