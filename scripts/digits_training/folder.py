"""The small files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def write_json(path: Path, content: Any) -> None:
    """Indented, and with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, model: PreTrainedModel, files: dict[str, Any], card: str) -> None:
    """The weights in float32, the config, JSON files by name, and the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name, content in files.items():
        write_json(folder / name, content)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def num_parameters(model: PreTrainedModel) -> int:
    """All of them."""
    return sum(parameter.numel() for parameter in model.parameters())
