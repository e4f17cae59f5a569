"""The embedded classifier is a whole, small folder that knows its digits."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from spanwise.embedded import EMBEDDED_FORWARD, embedded_folder
from spanwise.model.folder import read_config, resolve_model

IMAGE = "spanwise/digits-image"
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"

each_model = pytest.mark.parametrize("name", sorted(EMBEDDED_FORWARD))


@cache
def classifier() -> Any:
    return AutoModelForImageClassification.from_pretrained(EMBEDDED_FORWARD[IMAGE]).eval()


@cache
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images [num, 8, 8], 0 to 255, and their labels; none was trained on."""
    with np.load(DATA / "digits" / "held_out.npz") as arrays:
        return arrays["images"], arrays["labels"]


@torch.inference_mode()
def named(images: list[Image.Image]) -> list[str]:
    """What a user gets: the images through the folder's processor, the labels' names."""
    processor = AutoImageProcessor.from_pretrained(EMBEDDED_FORWARD[IMAGE])
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape[1:] == (3, 8, 8)
    model = classifier()
    return [model.config.id2label[index] for index in model(pixels).logits.argmax(-1).tolist()]


def accuracy(images: list[Image.Image]) -> float:
    labels = [str(label) for label in held_out()[1]]
    return sum(map(str.__eq__, named(images), labels)) / len(labels)


def stated(name: str, measure: str) -> float:
    """What the card says, from 0 to 1."""
    card = (EMBEDDED_FORWARD[name] / "README.md").read_text()
    found = re.search(rf"^\| {measure} \| ([\d.]+)% \|$", card, re.MULTILINE)
    assert found
    return float(found[1]) / 100


def test_names() -> None:
    assert tuple(EMBEDDED_FORWARD) == (IMAGE,)
    assert embedded_folder(IMAGE) == resolve_model(IMAGE) == EMBEDDED_FORWARD[IMAGE]


@each_model
def test_folder_is_small_and_whole(name: str) -> None:
    folder = EMBEDDED_FORWARD[name]
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 3_000_000
    assert files.keys() == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    }


def test_a_wheel_has_their_files(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": "none"}, check=True, timeout=120)
    for folder in EMBEDDED_FORWARD.values():
        packed = tmp_path / "spanwise" / "embedded" / folder.name
        assert {path.name for path in packed.iterdir()} == {path.name for path in folder.iterdir()}


@each_model
def test_weights_are_fp32(name: str) -> None:
    with safe_open(EMBEDDED_FORWARD[name] / "model.safetensors", framework="pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert kinds == {"F32"}


@each_model
def test_layers_and_heads_can_be_cut(name: str) -> None:
    config = read_config(EMBEDDED_FORWARD[name])
    assert config["num_hidden_layers"] == config["num_attention_heads"] == 4


@each_model
def test_card(name: str) -> None:
    card = (EMBEDDED_FORWARD[name] / "README.md").read_text()
    assert "license: apache-2.0" in card and "## Licence" in card
    assert f"scripts/train_{name.partition('/')[2].replace('-', '_')}.py" in card
    assert "/work" not in card and "/tmp" not in card


def test_held_out_images_are_as_files_have_them() -> None:
    images, labels = held_out()
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 8) and images.max() == 255
    assert len(images) >= 1797 // 5
    assert np.bincount(labels).min() >= 34  # a fifth of each digit


def test_digits_are_named_as_the_card_says() -> None:
    seen = accuracy([Image.fromarray(image) for image in held_out()[0]])
    assert seen >= 0.97
    assert seen == pytest.approx(stated(IMAGE, "Accuracy"), abs=0.005)


def test_dark_digits_on_light_are_named_too() -> None:
    seen = accuracy([Image.fromarray(255 - image) for image in held_out()[0]])
    assert seen >= 0.95
    assert seen == pytest.approx(stated(IMAGE, "Accuracy, dark on light"), abs=0.005)


def test_larger_pictures_in_colour_are_named() -> None:
    large = [Image.fromarray(image).resize((96, 96)).convert("RGB") for image in held_out()[0]]
    assert accuracy(large) >= 0.95
