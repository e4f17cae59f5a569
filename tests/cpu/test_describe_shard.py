"""What a shard will hold is known before a weight is read: cards are sized by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny_models import FAMILIES, MIXTURES, save_tiny_model

from spanwise.layout.split import split_evenly
from spanwise.model.shard import Shard, describe_shard, load_shard
from spanwise.types.worker import ShardSpec

NUM_LAYERS = 4


def specs(folder: Path, pp: int, tp: int, expert_parallel: bool = False) -> list[ShardSpec]:
    return [
        ShardSpec(
            folder=str(folder),
            dtype="float32",
            first_layer=stage.start,
            end_layer=stage.stop,
            num_layers=NUM_LAYERS,
            pp_rank=pp_rank,
            pp_size=pp,
            tp_rank=tp_rank,
            tp_size=tp,
            expert_parallel=expert_parallel,
        )
        for pp_rank, stage in enumerate(split_evenly(NUM_LAYERS, pp))
        for tp_rank in range(tp)
    ]


def held_bytes(shard: Shard) -> int:
    """Bytes of all memory that the loaded model's tensors lie in."""
    tensors = [t for t in (*shard.model.parameters(), *shard.model.buffers()) if not t.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_description_equals_what_is_loaded(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path)
    wanted = [specs(tmp_path, 1, 1)[0], specs(tmp_path, 1, 3)[1], specs(tmp_path, 2, 2)[-1]]
    if family in MIXTURES:
        wanted += specs(tmp_path, 1, 2, expert_parallel=True)[:1]
    for spec in wanted:
        described, shard = describe_shard(spec), load_shard(spec)
        assert described == shard.info()
        assert described.weight_bytes == held_bytes(shard) > 0


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    save_tiny_model("llama", tmp_path / "apart", tie_word_embeddings=False)
    tied, apart = (
        describe_shard(specs(tmp_path / name, 1, 1)[0]).weight_bytes for name in ("tied", "apart")
    )
    assert apart - tied == 131 * 48 * 4
    (shard,) = (load_shard(spec) for spec in specs(tmp_path / "tied", 1, 1))
    assert shard.model.get_output_embeddings().weight is shard.model.get_input_embeddings().weight
