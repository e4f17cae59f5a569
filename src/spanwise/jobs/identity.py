"""What makes a job the same job: its model, its options, its input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

_EDGE_BYTES = 1 << 20
_READ = (".json", ".jinja", ".model", ".txt", ".safetensors")
_SHOWN = 12


def job_identity(
    model: str, folder: Path | None, options: Mapping[str, Any], input_digest: str
) -> dict[str, str]:
    """Named words to compare. What does not change results (devices, layout, paths) is left out."""
    written = {name: msgspec.json.encode(options[name]).decode() for name in sorted(options)}
    contents = {"model's contents": folder_digest(folder)[:_SHOWN]} if folder is not None else {}
    return {"model": model, **contents, **written, "input": f"sha256 {input_digest[:_SHOWN]}"}


def folder_digest(folder: Path) -> str:
    """Of a model folder: names and sizes of its files, and their first and last megabyte."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_EDGE_BYTES))
                file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
                digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def item_seed(identity: Mapping[str, str], index: int) -> int:
    """The seed of an item that has none: the same each time the job is run."""
    job = msgspec.json.encode(dict(identity), order="sorted")
    return int.from_bytes(hashlib.sha256(job + b"%d" % index).digest()[:7])
