"""A model whose answers can be held to a grammar."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny_models import save_tiny_model
from tests.support.tokenizers import byte_level, save


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    """A tiny model with a tokenizer, and more logits than that has tokens."""
    folder = root / "llama"
    save_tiny_model("llama", folder)
    save(byte_level(), folder)
    return folder
