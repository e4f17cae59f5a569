"""Flat layers stand for the forwards they were checked against, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.compare import LOGIT_TOLERANCE, NUM_TOKENS, reference_of, worst_difference
from tests.support.replica import Replica
from tests.support.shards import shard_specs
from tests.support.tiny_models import FAMILIES, VOCAB, save_tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from spanwise.device import linear
from spanwise.model.flat import FlatLayer, OwnMlp
from spanwise.model.shard import Shard, load_shard
from spanwise.model.stage import own_forward
from spanwise.types.sampling import SamplingSpec

FLAT = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "mixtral", "qwen3_moe"}
LAYOUTS = [(1, 1), (1, 2), (2, 1), (4, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_tiny_model(family, made[family])
        return made[family]

    return folder


def layers(shard: Shard) -> list[Any]:
    names = [f"model.layers.{index}" for index in shard.layer_caches]
    return [own_forward(shard.model.get_submodule(name)) for name in names]


@pytest.mark.parametrize(("pp", "tp"), LAYOUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2"}))
def test_which_families_are_flat(
    family: str, pp: int, tp: int, folders: Callable[[str], Path]
) -> None:
    for spec in shard_specs(folders(family), pp, tp):
        found = {isinstance(layer, FlatLayer) for layer in layers(load_shard(spec))}
        assert found == {family in FLAT}


def test_routed_experts_stay_their_own_module(folders: Callable[[str], Path]) -> None:
    found = layers(load_shard(shard_specs(folders("qwen3_moe"))[0]))
    assert [isinstance(layer.mlp, OwnMlp) for layer in found] == [True, False, True, True]


def test_the_weights_as_they_were_loaded_are_let_go(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    shard = load_shard(shard_specs(folders("llama"))[0])
    kept = {name for name, tensor in shard.model.named_parameters() if not tensor.is_meta}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept if "bias" not in name} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "phi3", "mixtral", "gpt2", "gemma2", "gpt_oss"]
)
def test_packed_weights_give_the_same_tokens(
    family: str, pp: int, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of these models are too small to be packed by themselves."""
    right = reference_of(family, tmp_path)
    sampling = [SamplingSpec(logprobs=VOCAB)] * len(right.prompts)
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    tokens, logprobs = Replica(right.folder, pp=pp, tp=tp).generate(
        right.prompts, NUM_TOKENS, sampling
    )
    assert tokens == right.tokens
    assert worst_difference(tokens, logprobs, right) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_nothing_of_a_loaded_shard_lies_in_the_files(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed is read from them; what somebody writes there later changes nothing."""
    right = reference_of(family, tmp_path)
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    replica = Replica(right.folder)
    for path in tmp_path.glob("**/*.safetensors"):
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            file.write(b"\xff" * (path.stat().st_size - start))  # no numbers
    sampling = [SamplingSpec()] * len(right.prompts)
    assert replica.generate(right.prompts, NUM_TOKENS, sampling)[0] == right.tokens


def test_a_head_tied_to_the_embedding_counts_as_one_more(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    tied = load_shard(shard_specs(folders("qwen2"))[0])
    embedding = tied.model.get_input_embeddings().weight
    assert not embedding.is_meta
    stored = sum(
        tensor.nbytes
        for name, tensor in tied.model.state_dict().items()
        if name != "lm_head.weight"
    )
    buffers = sum(buffer.nbytes for buffer in tied.model.buffers())
    assert tied.weight_bytes == stored + buffers + embedding.nbytes


# -- layers that look the part and are not ---------------------------------------------------------


def half_the_residual(layer: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    mixed, _ = layer.self_attn(layer.input_layernorm(hidden), **options)
    hidden = hidden + 0.5 * mixed
    found: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return found


def mlp_beside_attention(layer: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    normed = layer.input_layernorm(hidden)
    found: torch.Tensor = hidden + layer.self_attn(normed, **options)[0] + layer.mlp(normed)
    return found


def norm_of_another_place(layer: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
    hidden = hidden + layer.self_attn(layer.post_attention_layernorm(hidden), **options)[0]
    found: torch.Tensor = hidden + layer.mlp(layer.input_layernorm(hidden))
    return found


@pytest.mark.parametrize("other", [half_the_residual, mlp_beside_attention, norm_of_another_place])
def test_a_layer_that_does_something_else_keeps_its_forward(
    other: Callable[..., torch.Tensor],
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", other)
    found = layers(load_shard(shard_specs(folders("llama"))[0]))
    assert not any(isinstance(layer, FlatLayer) for layer in found)


def test_one_layer_with_another_setting_is_seen(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, made = LlamaDecoderLayer.__init__, []

    def init(self: Any, *args: Any, **options: Any) -> None:
        right(self, *args, **options)
        self.scale = 1.0 if len(made) % 4 != 2 else 2.0
        made.append(self)

    def scaled(layer: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        hidden = hidden + layer.scale * layer.self_attn(layer.input_layernorm(hidden), **options)[0]
        found: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return found

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", init)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    found = layers(load_shard(shard_specs(folders("llama"))[0]))
    assert [isinstance(layer, FlatLayer) for layer in found] == [True, True, False, True]


def test_a_norm_that_is_none_keeps_its_forward(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absolute(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.weight, torch.Tensor)
        return self.weight * hidden / hidden.abs().mean(-1, keepdim=True)

    monkeypatch.setattr(LlamaRMSNorm, "forward", absolute)
    found = layers(load_shard(shard_specs(folders("llama"))[0]))
    assert not any(isinstance(layer, FlatLayer) for layer in found)


def test_a_layer_that_looks_at_positions_keeps_its_forward(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it does nothing with those that it is watched with."""
    right = LlamaDecoderLayer.forward

    def scaled(layer: Any, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        far = torch.floor(options["position_ids"] / 1000)[0, :, None]
        return right(layer, hidden * (1.0 + far), **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    found = layers(load_shard(shard_specs(folders("llama"))[0]))
    assert not any(isinstance(layer, FlatLayer) for layer in found)
