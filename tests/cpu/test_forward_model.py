"""Models of one forward: what they take, what they are run on before they are cut, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.forward_models import FAMILIES, save
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertModel

from spanwise.errors import ModelError
from spanwise.model.example import example_batch
from spanwise.model.folder import is_factory
from spanwise.model.forward_model import (
    ForwardModel,
    describe_forward_model,
    load_forward_model,
)
from spanwise.model.sentence import SentenceEncoder, pool, read_pooling
from spanwise.model.tensor_data import from_tensor
from spanwise.types.forward import InputSpec


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folder_is_described_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    described = describe_forward_model(str(tmp_path), "float32")
    loaded = load_forward_model(str(tmp_path), "float32")
    assert described.inputs == loaded.inputs and described.labels == loaded.labels
    assert any(tensor.is_meta for tensor in described.module.parameters())
    assert not any(tensor.is_meta for tensor in loaded.module.parameters())
    assert not loaded.module.training
    batch = example_batch(loaded)
    assert {len(tensor) for tensor in batch.tensors} == {2}
    with torch.inference_mode():
        named = loaded.named(batch.names)
        outputs = named(*batch.tensors)
    assert len(named.output_names) == len(outputs) > 0


def test_classes_have_their_names(tmp_path: Path) -> None:
    save("vit", tmp_path)
    assert load_forward_model(str(tmp_path), "auto").labels == tuple(f"LABEL_{i}" for i in range(7))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("module:factory", True),
        ("package.module:factory", True),
        ("package.module:Class.make", True),
        ("folder", False),
        ("organisation/model", False),
        ("C:\\models", False),
        (":x", False),
        ("x:", False),
        ("a b:c", False),
    ],
)
def test_what_is_a_factory(name: str, is_one: bool) -> None:
    assert is_factory(name) is is_one


def _damaged(folder: Path, **config: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_a_folder_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    save("vit", tmp_path)
    with pytest.raises(ModelError, match="no class of transformers"):
        load_forward_model(_damaged(tmp_path, architectures=["ViTForMagic"]), "float32")
    folder = _damaged(tmp_path, architectures=["ViTForImageClassification"])
    with pytest.raises(ModelError, match="dtype 'int3'"):
        load_forward_model(folder, "int3")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 'classifier\.weight'"):
        load_forward_model(folder, "float32")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_forward_model(folder, "float32")


def _model(module: nn.Module, **inputs: InputSpec) -> ForwardModel:
    specs = tuple(inputs.values())
    return ForwardModel(module.eval(), specs, (), "Own", "module", "float32", {})


class _Matrix(nn.Module):
    """Takes any number of rows of 6, and one of 6 numbers beside them."""

    def forward(self, rows: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), -1, 6).sum(1) @ torch.eye(6) + one


def test_sizes_that_vary_are_found_by_trying() -> None:
    model = _model(_Matrix(), rows=InputSpec(name="rows"), one=InputSpec(name="one"))
    example = [from_tensor("rows", torch.randn(4, 6)), from_tensor("1", torch.randn(6))]
    batch = example_batch(model, example)
    assert batch.names == ("rows", "one") and batch.varying == ((0, 1, 2), (0,))
    assert [spec.shape for spec in batch.inputs] == [(None, None), (6,)]


class _Sum(nn.Module):
    """Takes two of one length."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


def test_sizes_that_must_agree_vary_together() -> None:
    model = _model(_Sum(), a=InputSpec(name="a"), b=InputSpec(name="b"))
    batch = example_batch(model, [from_tensor("a", torch.ones(5)), from_tensor("b", torch.ones(5))])
    assert batch.varying == ((0, 1), (0, 1))


def test_a_module_of_which_nothing_is_known_wants_an_example() -> None:
    model = _model(_Sum(), a=InputSpec(name="a"), b=InputSpec(name="b"))
    with pytest.raises(ModelError, match="give example="):
        example_batch(model)
    with pytest.raises(ModelError, match="'c'"):
        example_batch(model, [from_tensor("c", torch.ones(5))])


def _sentence_folder(folder: Path, mode: str, *, normalize: bool = True) -> nn.Module:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=32,
    )  # fmt: skip
    encoder = BertModel(config).eval()
    encoder.save_pretrained(folder)
    parts = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"path": f"{i}_{part}" if i else "", "type": f"sentence_transformers.models.{part}"}
        for i, part in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 16, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    return encoder


MODES = {
    "cls_token": lambda states: states[0],
    "mean_tokens": lambda states: states.mean(0),
    "max_tokens": lambda states: states.amax(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_text_becomes_one_vector_as_its_folder_says(mode: str, tmp_path: Path) -> None:
    encoder = _sentence_folder(tmp_path, mode)
    model = load_forward_model(str(tmp_path), "float32")
    assert isinstance(model.module, SentenceEncoder)
    long, short = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([11, 12, 13])
    ids = torch.stack([long, torch.cat([short, torch.zeros(2, dtype=torch.long)])])
    mask = (ids != 0).long()
    with torch.inference_mode():
        (got,) = model.named(("input_ids", "attention_mask"))(ids, mask)
        for row, own in zip(got, (long, short), strict=True):
            expected = MODES[mode](encoder(own[None]).last_hidden_state[0])
            assert torch.allclose(row, expected / expected.norm(), atol=1e-5)
    assert model.lengths_of("embedding", 2) is None


def test_pooling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    _sentence_folder(tmp_path, "weightedmean_tokens")
    with pytest.raises(ModelError, match="pooling_mode_weightedmean_tokens"):
        load_forward_model(str(tmp_path), "float32")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.models.WordWeights"}]))
    with pytest.raises(ModelError, match="WordWeights"):
        load_forward_model(str(tmp_path), "float32")
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_forward_model(str(tmp_path), "float32")


def test_a_vector_that_is_not_normalised_stays_as_it_is(tmp_path: Path) -> None:
    _sentence_folder(tmp_path, "mean_tokens", normalize=False)
    assert read_pooling(tmp_path) == ("mean", False)
    states, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.allclose(pool(states, mask, "mean")[0], states[0, :2].mean(0))


def test_which_outputs_are_as_long_as_their_input(tmp_path: Path) -> None:
    save("t5", tmp_path / "t5")
    t5 = load_forward_model(str(tmp_path / "t5"), "float32")
    assert t5.lengths_of("logits", 3) is None
    length_of = t5.lengths_of("encoder_last_hidden_state", 3)
    assert length_of is not None and length_of(7) == 7
    save("wav2vec2", tmp_path / "speech")
    speech = load_forward_model(str(tmp_path / "speech"), "float32")
    frames_of = speech.lengths_of("logits", 3)
    assert frames_of is not None and frames_of(400) == 19
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20,
    )  # fmt: skip
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "qa")
    answers = load_forward_model(str(tmp_path / "qa"), "float32")
    assert answers.lengths_of("start_logits", 2) is not None
    assert answers.lengths_of("pooler_output", 2) is None
