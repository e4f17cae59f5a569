"""Images and audio reach a model as transformers' own processors would bring them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from spanwise.errors import InputError, ModelError
from spanwise.jobs.pictures import Pictures, PictureSettings
from spanwise.jobs.readings import Labels, Transcript, numbers_of
from spanwise.jobs.sound import Sound, SoundSettings

_NORM = {"do_normalize": True, "image_mean": [0.1, 0.5, 0.7], "image_std": [0.2, 0.3, 0.6]}
VIT: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 16, "width": 12},
    "resample": 2,
} | _NORM
CROPPED: dict[str, Any] = _NORM | {
    "do_resize": True,
    "size": {"shortest_edge": 18},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 11, "width": 16},
}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels, mode)


@pytest.mark.parametrize("size", [(40, 30), (21, 50), (18, 18), (5, 7)])
@pytest.mark.parametrize(
    ("kind", "processor", "settings"),
    [
        ("ViTImageProcessor", ViTImageProcessorPil, VIT),
        ("BitImageProcessor", BitImageProcessorPil, CROPPED),
    ],
)
def test_images_are_prepared_as_by_transformers(
    tmp_path: Path, size: tuple[int, int], kind: str, processor: Any, settings: dict[str, Any]
) -> None:
    path = tmp_path / "x.png"
    noise(*size).save(path)
    read = msgspec.convert({"image_processor_type": kind} | settings, PictureSettings)
    found = Pictures(read, 3).read(path)
    with Image.open(path) as image:
        wanted = processor(**settings, do_convert_rgb=True)(image, return_tensors="np")
    assert found.dtype == np.float32 and found.shape == wanted["pixel_values"][0].shape
    np.testing.assert_allclose(found, wanted["pixel_values"][0], atol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P", "CMYK"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_kind_of_image_has_the_model_s_channels(
    tmp_path: Path, mode: str, num_channels: int
) -> None:
    image = noise(9, 8).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    settings = PictureSettings(image_processor_type="ViTImageProcessor")
    found = Pictures(settings, num_channels).read(path)
    assert found.shape == (num_channels, 8, 9) and 0 <= found.min() < found.max() <= 1


def test_steps_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="OddImageProcessor; images can be prepared for ViT"):
        Pictures(PictureSettings(image_processor_type="OddImageProcessor"), 3)
    with pytest.raises(ModelError, match="WhisperFeatureExtractor; audio can be"):
        Sound(SoundSettings(feature_extractor_type="WhisperFeatureExtractor"), 9)


# --- sound


def write(path: Path, samples: np.ndarray[Any, Any], width: int, rate: int = 16_000) -> None:
    """``samples`` [num, channels] from -1 to 1."""
    whole = np.round(samples * ((1 << 8 * width - 1) - 1)).astype("<i8")
    whole = whole + 128 if width == 1 else whole
    octets = whole[..., None].view(np.uint8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(octets).tobytes())


def sound(normalize: bool, max_s: float = 10) -> Sound:
    kind = "Wav2Vec2FeatureExtractor"
    return Sound(SoundSettings(feature_extractor_type=kind, do_normalize=normalize), max_s)


@pytest.mark.parametrize(("width", "close"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_samples_of_every_width_are_read(
    tmp_path: Path, width: int, close: float, num_channels: int
) -> None:
    samples = np.random.default_rng(1).uniform(-1, 1, (500, num_channels))
    write(tmp_path / "x.wav", samples, width)
    found = sound(False).read(tmp_path / "x.wav")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=close)


def test_sound_is_prepared_as_by_transformers(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).normal(0.1, 0.2, (700, 1)).clip(-1, 1)
    write(tmp_path / "x.wav", samples, 2)
    found = sound(True).read(tmp_path / "x.wav")
    plain = sound(False).read(tmp_path / "x.wav")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    wanted = extractor(plain, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_audio_that_is_too_long_is_never_read(tmp_path: Path) -> None:
    write(tmp_path / "x.wav", np.zeros((16_001, 1)), 2)
    with pytest.raises(InputError, match="1 s long, 1 s at most; cut it"):
        sound(True, 1).read(tmp_path / "x.wav")
    assert len(sound(True, 1.1).read(tmp_path / "x.wav")) == 16_001


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (24, b"\0\0\0\0", "0 samples a second"),
        (34, b"\x40\0", "64 bits, 32 at most"),
        (22, b"\0\0", "cannot be read"),
        (20, b"\3\0", "cannot be read"),
        (8, b"AVI ", "cannot be read"),
        (40, b"\xff\xff\0\0", "cut off"),
    ],
)
def test_a_damaged_head_is_an_error_of_the_item(
    tmp_path: Path, place: int, value: bytes, said: str
) -> None:
    path = tmp_path / "x.wav"
    write(path, np.zeros((800, 1)), 2)
    octets = bytearray(path.read_bytes())
    octets[place : place + len(value)] = value
    path.write_bytes(octets)
    with pytest.raises(InputError, match=said):
        sound(True).read(path)


# --- what is told


def test_a_label_has_its_probability() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    share = np.exp(3.0) / np.exp(logits.astype(np.float64)).sum()
    told = Labels("abc")({"logits": logits})
    assert told["label"] == "b" and told["score"] == pytest.approx(share, abs=1e-6)
    assert Labels("ab")({"logits": logits}) == {"outputs": {"logits": [1.0, 3.0, 2.0]}}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_of_the_item(value: float) -> None:
    bad = {"logits": np.array([1.0, value, 0.0], np.float32)}
    for read in (Labels("abc"), numbers_of):
        with pytest.raises(InputError, match="not finite"):
            read(bad)
    with pytest.raises(InputError, match="not finite"):
        Transcript(["", "a", "b"], 0, "|")({"logits": bad["logits"][None]})


def test_a_transcript_is_read_from_frames() -> None:
    tokens = ["<pad>", "|", "a", "b"]
    frames = np.eye(4)[[0, 1, 2, 2, 0, 2, 3, 1, 1, 0, 1, 3, 3, 0]]
    assert Transcript(tokens, 0, "|")({"logits": frames}) == {"transcript": "aab b"}
