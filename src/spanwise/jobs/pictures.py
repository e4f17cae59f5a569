"""An image file to what a vision model takes, as its folder's preprocessor_config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from spanwise.errors import InputError, ModelError, reason
from spanwise.jobs.extras import optional_module

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Those whose steps are the ones below, under the names of all their versions.
_KINDS = ("ViT", "DeiT", "Bit", "CLIP", "Siglip")
_NAMES = {
    f"{kind}{ending}"
    for kind in _KINDS
    for ending in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
_BICUBIC = 3

Size = dict[str, int]


class PictureSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of preprocessor_config.json, in transformers' words."""

    image_processor_type: str = ""
    feature_extractor_type: str = ""
    do_convert_rgb: bool | None = None
    do_resize: bool = False
    size: Size | int | None = None
    resample: int = _BICUBIC
    do_center_crop: bool = False
    crop_size: Size | int | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = False
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)


class Pictures:
    """Reads image files for one model.

    Raises ModelError for steps that are not known, InputError where Pillow is missing.
    """

    def __init__(self, settings: PictureSettings, num_channels: int) -> None:
        name = settings.image_processor_type or settings.feature_extractor_type
        if name not in _NAMES:
            raise ModelError(
                f"preprocessor_config.json names {name or 'no image_processor_type'}; images can "
                f"be prepared for {', '.join(_KINDS)} image processors"
            )
        self._settings, self._num_channels = settings, num_channels
        self._pillow = optional_module("PIL.Image", "images")

    def read(self, path: Path) -> NDArray[np.float32]:
        """The picture as [channels, height, width]. Raises InputError saying why it cannot be."""
        if path.stat().st_size == 0:
            raise InputError("the file is empty")
        try:
            with self._pillow.open(path) as image:
                # Palettes with transparency are read as they look.
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")
                pixels = self._pixels(image.convert("L" if self._num_channels == 1 else "RGB"))
        except Exception as error:  # a broken file may raise anything
            raise InputError(f"the image cannot be read: {reason(error)}") from error
        return self._scaled(pixels)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        """[height, width, channels], resized and cropped."""
        settings = self._settings
        if settings.do_resize and settings.size is not None:
            size = _resized(settings.size, image.height, image.width)
            image = image.resize(size, self._pillow.Resampling(settings.resample))
        pixels = np.array(image)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if settings.do_center_crop and settings.crop_size is not None:
            pixels = _cropped(pixels, *_height_and_width(settings.crop_size))
        return pixels

    def _scaled(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        settings, scaled = self._settings, pixels.astype(np.float32)
        if settings.do_rescale:
            scaled = scaled * np.float32(settings.rescale_factor)
        if settings.do_normalize:
            mean, deviation = (np.array(e, np.float32) for e in self._norm())
            scaled = (scaled - mean) / deviation
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))

    def _norm(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation, of as many channels as there are."""
        count = self._num_channels
        return self._settings.image_mean[:count], self._settings.image_std[:count]


def _resized(size: Size | int, height: int, width: int) -> tuple[int, int]:
    """Width and height to resize to."""
    if isinstance(size, dict) and "shortest_edge" in size:
        short, long = sorted((height, width))
        edge = size["shortest_edge"]
        other = int(edge * long / short)
        return (edge, other) if width <= height else (other, edge)
    wanted_height, wanted_width = _height_and_width(size)
    return wanted_width, wanted_height


def _height_and_width(size: Size | int) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if size.keys() >= {"height", "width"}:
        return size["height"], size["width"]
    raise ModelError(
        f"preprocessor_config.json has the size {size}; give height and width, or shortest_edge"
    )


def _cropped(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle; where the picture is smaller, with black around it."""
    room = [max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)]
    if any(room):
        around = [(-(-each // 2), each // 2) for each in room]
        pixels = np.pad(pixels, (*around, (0, 0)))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
