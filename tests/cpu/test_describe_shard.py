"""What a shard will hold is known before a weight is read: cards are sized by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.shards import shard_specs
from tests.support.tiny_models import FAMILIES, MIXTURES, save_tiny_model

from spanwise.model.shard import Shard, describe_shard, load_shard


def held_bytes(shard: Shard) -> int:
    """Bytes of all memory that the loaded model's tensors lie in."""
    tensors = [t for t in (*shard.model.parameters(), *shard.model.buffers()) if not t.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_description_equals_what_is_loaded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same for the form that is computed with, whose tensors are not the model's."""
    save_tiny_model(family, tmp_path)
    wanted = shard_specs(tmp_path)
    wanted += [shard_specs(tmp_path, tp=3)[1], shard_specs(tmp_path, pp=2, tp=2)[-1]]
    if family in MIXTURES:
        wanted += shard_specs(tmp_path, tp=2, expert_parallel=True)[:1]
    for spec in wanted:
        described = describe_shard(spec)
        assert described == load_shard(spec).info()
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "prepare", lambda *_: None)
            shard = load_shard(spec)
        assert described.weight_bytes == held_bytes(shard) > 0


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    save_tiny_model("llama", tmp_path / "apart", tie_word_embeddings=False)
    tied, apart = (
        describe_shard(shard_specs(tmp_path / name)[0]).weight_bytes for name in ("tied", "apart")
    )
    assert apart - tied == 131 * 48 * 4
    (shard,) = (load_shard(spec) for spec in shard_specs(tmp_path / "tied"))
    assert shard.model.get_output_embeddings().weight is shard.model.get_input_embeddings().weight
