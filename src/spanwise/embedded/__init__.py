"""Two tiny models that come with the package, so that everything runs with no download.

Both are ordinary Hugging Face folders, trained by ``scripts/train_embedded.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["EMBEDDED", "embedded_folder"]

_HERE = Path(__file__).resolve().parent

EMBEDDED: Mapping[str, Path] = MappingProxyType(
    {f"spanwise/{folder}": _HERE / folder for folder in ("tiny-dense", "tiny-moe")}
)
"""Model name -> its folder."""


def embedded_folder(name: str) -> Path | None:
    """The folder of the embedded model called `name`, or None if there is no such model."""
    return EMBEDDED.get(name)
