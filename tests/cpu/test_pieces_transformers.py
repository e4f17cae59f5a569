"""Models of transformers taken apart give what they give whole, in any number of stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.support.pieces import assert_same, cut, draw_weights, run_cut
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from spanwise.model.exported_pieces import ExportedPieces
from spanwise.model.pieces import Pieces, by_operations, by_submodules, take_apart

BLOCK = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


class Named(nn.Module):
    """Takes a model's inputs by place and gives some of its outputs."""

    def __init__(
        self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str], **fixed: object
    ) -> None:
        super().__init__()
        self.model = model
        self._inputs, self._outputs, self._fixed = inputs, outputs, fixed

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(**dict(zip(self._inputs, given, strict=True)), **self._fixed)
        return tuple(output[name] for name in self._outputs)


@dataclass(frozen=True)
class Family:
    """``inputs`` draws inputs for a batch and a length; those that do not vary ignore that one."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], list[torch.Tensor]]
    varying: Sequence[Sequence[int]]
    least_pieces: int


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 90, (batch, length))


def ids_and_mask(batch: int, length: int) -> list[torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 3 :] = 0
    return [ids(batch, length), mask]


def vit() -> nn.Module:
    config = ViTConfig(**BLOCK, num_hidden_layers=3, image_size=16, patch_size=4, num_labels=7)
    return Named(ViTForImageClassification(config), ["pixel_values"], ["logits"])


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], layer_type="basic"
    )
    return Named(ResNetForImageClassification(config), ["pixel_values"], ["logits"])


def bert() -> nn.Module:
    model = BertModel(BertConfig(**BLOCK, vocab_size=100, num_hidden_layers=3))
    return Named(model, ["input_ids", "attention_mask"], ["last_hidden_state", "pooler_output"])


def whisper() -> nn.Module:
    config = WhisperConfig(
        vocab_size=100, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=20, max_target_positions=30,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    names = ["input_features", "decoder_input_ids"]
    return Named(WhisperForConditionalGeneration(config), names, ["logits"], use_cache=False)


def wav2vec2() -> nn.Module:
    config = Wav2Vec2Config(
        **BLOCK, vocab_size=30, num_hidden_layers=2, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return Named(Wav2Vec2ForCTC(config), ["input_values"], ["logits"])


def clip() -> nn.Module:
    towers = {**BLOCK, "num_hidden_layers": 2, "projection_dim": 24}
    text = {**towers, "vocab_size": 100, "max_position_embeddings": 30, "eos_token_id": 99}
    vision = {**towers, "image_size": 16, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    names = ["input_ids", "pixel_values", "attention_mask"]
    outputs = ["logits_per_image", "text_embeds", "image_embeds"]
    return Named(CLIPModel(config), names, outputs)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    return Named(T5ForConditionalGeneration(config), names, ["logits"], use_cache=False)


def image(batch: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 3, 16, 16)]


def text_and_image(batch: int, length: int) -> list[torch.Tensor]:
    text, mask = ids_and_mask(batch, length)
    return [text, *image(batch, length), mask]


FAMILIES = {
    "vit": Family(vit, image, [[0]], 6),
    "resnet": Family(resnet, lambda b, n: [torch.randn(b, 3, 64, 64)], [[0]], 6),
    "bert": Family(bert, ids_and_mask, [[0, 1], [0, 1]], 6),
    "whisper": Family(
        whisper, lambda b, n: [torch.randn(b, 8, 40), ids(b, n)], [[0], [0, 1]], 8
    ),
    "wav2vec2": Family(wav2vec2, lambda b, n: [torch.randn(b, 37 * n)], [[0, 1]], 6),
    "clip": Family(clip, text_and_image, [[0, 1], [0], [0, 1]], 8),
    "t5": Family(t5, lambda b, n: [*ids_and_mask(b, n), ids(b, n + 2)], [[0, 1]] * 3, 8),
}  # fmt: skip


WAYS = {"operations": by_operations, "submodules": by_submodules}
Taken = Callable[[str, str], tuple[nn.Module, Pieces]]


@pytest.fixture(scope="module")
def taken() -> Taken:
    made: dict[tuple[str, str], tuple[nn.Module, Pieces]] = {}

    def take(name: str, way: str) -> tuple[nn.Module, Pieces]:
        if (name, way) not in made:
            family = FAMILIES[name]
            torch.manual_seed(0)
            module = draw_weights(family.model())
            pieces = WAYS[way](module, family.inputs(2, 10), family.varying)
            made[name, way] = module, pieces
        return made[name, way]

    return take


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_give_what_the_model_gives(name: str, way: str, taken: Taken) -> None:
    module, pieces = taken(name, way)
    assert [list(dims) for dims in pieces.varying] == [*FAMILIES[name].varying]
    assert pieces.num_pieces >= FAMILIES[name].least_pieces - (way == "submodules")
    assert len(pieces.carried_bytes) == pieces.num_pieces - 1
    cuts = [cut(pieces, num_stages) for num_stages in (1, 2, 3, pieces.num_pieces)]
    for batch, length in [(2, 10), (1, 7), (5, 13)]:
        torch.manual_seed(batch)
        inputs = FAMILIES[name].inputs(batch, length)
        with torch.inference_mode():
            wanted = module(*inputs)
        assert all(float(whole.abs().max()) > 0.01 for whole in wanted)
        for stages in cuts:
            assert_same(run_cut(stages, inputs), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_hold_every_weight_once(name: str, way: str, taken: Taken) -> None:
    module, pieces = taken(name, way)
    held = {
        tensor.data_ptr()
        for piece in range(pieces.num_pieces)
        for tensor in pieces.stage(piece, piece + 1).tensors()
    }
    weights = {weight.data_ptr(): weight.nbytes for weight in module.parameters()}
    unused = weights.keys() - held
    assert sum(weights[pointer] for pointer in unused) <= 0.01 * sum(weights.values())
    assert sum(pieces.weight_bytes) >= sum(weights[pointer] for pointer in weights.keys() & held)
    assert max(pieces.weight_bytes) <= 0.5 * sum(pieces.weight_bytes)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_inputs_travel(name: str, taken: Taken) -> None:
    _, pieces = taken(name, "operations")
    inputs = FAMILIES[name].inputs(2, 10)
    with torch.inference_mode():
        carried = pieces.stage(0, 1).run(inputs, [])
    pointers = {given.data_ptr() for given in inputs}
    assert not any(isinstance(c, torch.Tensor) and c.data_ptr() in pointers for c in carried)


def test_the_first_way_is_taken_where_it_works() -> None:
    family = FAMILIES["bert"]
    pieces = take_apart(draw_weights(family.model()), family.inputs(2, 10), family.varying)
    assert isinstance(pieces.way, ExportedPieces)
