"""Train the embedded image classifier, spanwise/digits-image.

The data are the 1,797 handwritten digits that come with scikit-learn, so nothing is downloaded. A
fifth of them is held out and never looked at before the end. Two to three minutes on one core; with
one thread, a machine makes the same weights each time. Needs scikit-learn, which Spanwise itself
does not: pip install scikit-learn

Examples:
  python scripts/train_digits_image.py --epochs 2 --output build/digits-image   # to see it work
  python scripts/train_digits_image.py                                          # the real thing
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_training.folder import num_parameters, write_folder
from digits_training.images import NUM_CLASSES, Digits, pixel_values, read_digits, vary
from digits_training.schedule import make_optimizer
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "src" / "spanwise" / "embedded" / "digits-image"
BATCH = 64
PEAK_LR = 2e-3
IMAGE_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags: [digits, tiny, vit]
---

# spanwise/digits-image

A tiny classifier of handwritten digits. It comes with Spanwise so that image classification can be
tried with no download. It sees 8 by 8 pixels: crop a picture to one digit before you give it. Light
digits on dark and dark ones on light are both read; colours count by their mean.

| | |
|---|---|
| Architecture | `ViTForImageClassification` |
| Parameters | {parameters:,} |
| Layers / heads / hidden | {config.num_hidden_layers} / {config.num_attention_heads} / \
{config.hidden_size} |
| Image | 8 x 8, patches of 2 x 2 |
| Labels | 0 to 9 |
| Weights | float32 |

## Quality

| Held-out measure | |
|---|---|
| Accuracy | {accuracy:.2%} |
| Accuracy, dark on light | {inverted:.2%} |

Measured on {held} images, a fifth of each digit, drawn by the seed and never trained on. Some of
those who wrote them wrote others too, so a stranger's hand will be read less well.

## Training

- Data: the 1,797 images of `sklearn.datasets.load_digits`, 8 by 8 with 17 levels of grey, here
  stretched to 0 to 255. Turned, shifted and stretched a little, half of them inverted.
- {epochs} epochs of {trained} images, {minutes:.1f} min on one CPU core.
- Optimiser: AdamW, cosine schedule, label smoothing 0.1.
- Script: `python scripts/train_digits_image.py --epochs {epochs} --seed {seed}` (with
  scikit-learn).

## Licence

The weights are under the Apache License 2.0. The images are a part of "Optical Recognition of
Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49), under the Creative Commons Attribution 4.0 licence.
"""


def parse() -> argparse.Namespace:
    """The command line."""
    summary, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="Examples:" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=250, help="passes over the images (250)")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the training (1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the model's folder")
    parser.add_argument("--held-out", type=Path, help="write the held-out images here, as .npz")
    return parser.parse_args()


def build() -> ViTForImageClassification:
    """The model, its three channels alike: the digits have no colour, so they stay alike."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        initializer_range=0.1,  # 0.02 is for wide layers
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        id2label={number: str(number) for number in range(NUM_CLASSES)},
        label2id={str(number): number for number in range(NUM_CLASSES)},
    )
    model = ViTForImageClassification(config)
    kernel = model.vit.embeddings.patch_embeddings.projection.weight
    with torch.no_grad():
        kernel.copy_(kernel.mean(1, keepdim=True).expand_as(kernel))
    return model


def train(model: ViTForImageClassification, digits: Digits, epochs: int, seed: int) -> None:
    """In place."""
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(digits) // BATCH)
    optimizer, schedule = make_optimizer(model, PEAK_LR, epochs * steps, weight_decay=0.05)
    pixels = pixel_values(digits.images)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(digits), generator=generator), BATCH):
            logits = model(pixel_values=vary(pixels[rows], generator)).logits
            loss = cross_entropy(logits, digits.labels[rows], label_smoothing=0.1)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}  loss {total / steps:.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The part that is named rightly."""
    right: torch.Tensor = model(pixel_values=pixels).logits.argmax(-1) == labels
    return right.float().mean().item()


def card(model: Any, held: Digits, num_trained: int, minutes: float, options: Any) -> str:
    """The model card, with what was measured."""
    pixels = pixel_values(held.images)
    measured = [accuracy(model, sign * pixels, held.labels) for sign in (1, -1)]
    print(f"held-out accuracy {measured[0]:.4f}, dark on light {measured[1]:.4f}", flush=True)
    return CARD.format(
        parameters=num_parameters(model),
        config=model.config,
        accuracy=measured[0],
        inverted=measured[1],
        held=len(held),
        trained=num_trained,
        epochs=options.epochs,
        seed=options.seed,
        minutes=minutes,
    )


def main() -> None:
    """Train, measure, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    disable_progress_bar()
    digits, held = read_digits(options.seed)
    model = build()
    started = time.monotonic()
    train(model, digits, options.epochs, options.seed)
    minutes = (time.monotonic() - started) / 60
    text = card(model, held, len(digits), minutes, options)
    write_folder(options.output, model, {"preprocessor_config.json": IMAGE_PROCESSOR}, text)
    if options.held_out:
        options.held_out.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            options.held_out, images=held.images.numpy(), labels=held.labels.numpy().astype("u1")
        )


if __name__ == "__main__":
    main()
