"""Tiny random models of many kinds, and items for them; drawn so that an error shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
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

Item = dict[str, torch.Tensor]
VOCAB = 50


@dataclass(frozen=True)
class Family:
    """A model's class, and how its ``index``-th item is drawn."""

    make: Callable[[], PreTrainedModel]
    item: Callable[[torch.Generator, int], Item]
    has_tensor_plan: bool = True


def _ids(generator: torch.Generator, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=generator)


def _vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_channels=1,
            num_labels=7,
        )
    )


def _resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[2, 2],
            layer_type="basic",
            num_labels=5,
        )
    )


def _bert() -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
        )
    )


def _whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=20,
            max_target_positions=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def _wav2vec2() -> PreTrainedModel:
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=12,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_kernel=(10, 4),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
    )


def _clip() -> PreTrainedModel:
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return CLIPModel(
        CLIPConfig(
            text_config={
                **common,
                "vocab_size": VOCAB,
                "max_position_embeddings": 16,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
            },
            vision_config={**common, "image_size": 16, "patch_size": 4},
            projection_dim=24,
        )
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


def _clip_item(generator: torch.Generator, index: int) -> Item:
    ids = torch.cat([_ids(generator, 4 + index % 5), torch.tensor([2])])
    return {"input_ids": ids, "pixel_values": torch.randn(3, 16, 16, generator=generator)}


FAMILIES = {
    "vit": Family(_vit, lambda g, i: {"pixel_values": torch.randn(1, 16, 16, generator=g)}),
    "resnet": Family(
        _resnet, lambda g, i: {"pixel_values": torch.randn(3, 24, 24, generator=g)}, False
    ),
    "bert": Family(_bert, lambda g, i: {"input_ids": _ids(g, 3 + 7 * i % 40)}),
    "whisper": Family(
        _whisper,
        lambda g, i: {
            "input_features": torch.randn(8, 40, generator=g),
            "decoder_input_ids": _ids(g, 2 + i % 4),
        },
    ),
    "wav2vec2": Family(
        _wav2vec2, lambda g, i: {"input_values": torch.randn(400 + 97 * (i % 6), generator=g)}
    ),
    "clip": Family(_clip, _clip_item),
    "t5": Family(
        _t5,
        lambda g, i: {
            "input_ids": _ids(g, 4 + 3 * i % 17),
            "decoder_input_ids": _ids(g, 2 + i % 4),
        },
    ),
}


def save(name: str, folder: Path) -> PreTrainedModel:
    """Draw a family's model, save it, and give it."""
    torch.manual_seed(7)
    model = FAMILIES[name].make().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(0, 1.5 * tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)  # norms, biases, variances
    model.save_pretrained(folder)
    return model


def items(name: str, count: int) -> list[Item]:
    """So many items, of different lengths where there are any."""
    generator = torch.Generator().manual_seed(11)
    return [FAMILIES[name].item(generator, index) for index in range(count)]


@torch.inference_mode()
def alone(model: nn.Module, item: Item) -> dict[str, torch.Tensor]:
    """What the model itself gives for the item alone."""
    outputs = model(**{name: tensor[None] for name, tensor in item.items()}, return_dict=True)
    return {k: v[0] for k, v in outputs.items() if isinstance(v, torch.Tensor) and len(v) == 1}
