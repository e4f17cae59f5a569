"""Tiny models that come with the package, so that everything runs with no download.

All are ordinary Hugging Face folders. ``scripts/train_embedded.py`` trained the language models,
``scripts/train_digits_image.py`` the classifier.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["EMBEDDED", "EMBEDDED_FORWARD", "embedded_folder"]

_HERE = Path(__file__).resolve().parent


def _folders(*names: str) -> Mapping[str, Path]:
    return MappingProxyType({f"spanwise/{name}": _HERE / name for name in names})


EMBEDDED: Mapping[str, Path] = _folders("tiny-dense", "tiny-moe")
"""Language model's name -> its folder."""

EMBEDDED_FORWARD: Mapping[str, Path] = _folders("digits-image")
"""Name -> folder, of models that answer in one forward."""


def embedded_folder(name: str) -> Path | None:
    """The folder of the embedded model called `name`, or None if there is no such model."""
    return EMBEDDED.get(name) or EMBEDDED_FORWARD.get(name)
