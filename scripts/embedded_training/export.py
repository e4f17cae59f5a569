"""A model as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from .card import card
from .models import BUILDERS
from .quality import measure
from .tokenizer import BOS, END, EOS, PAD, SPECIAL
from .trained import Trained


def generation_config() -> GenerationConfig:
    """Greedy; stops at the end of a text and at the end of a chat's turn."""
    return GenerationConfig(
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=[SPECIAL.index(EOS), SPECIAL.index(END)],
    )


def use_common_names(folder: Path) -> None:
    """Undo two names that only the newest transformers knows."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts"', '"num_experts"'))
    tokenizer = folder / "tokenizer_config.json"
    text = tokenizer.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer.write_text(text)


def export(trained: Trained, folder: Path, *, final: bool) -> None:
    """Write the model's folder whole, and only then put it in the place of the old one."""
    rounded: Any = BUILDERS[trained.kind]()
    rounded.load_state_dict(trained.model.state_dict())
    rounded.to(torch.bfloat16)
    rounded.generation_config = generation_config()
    new = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    rounded.save_pretrained(new)
    trained.tokenizer.save_pretrained(new)
    for path in new.iterdir():
        path.chmod(0o644)
    use_common_names(new)
    rounded.float().eval()
    limit = 10**9 if final else 30_000
    quality = measure(rounded, trained.tokenizer, trained.held, limit)
    (new / "README.md").write_text(card(trained, quality, final), encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    print(
        f"{trained.kind}: exported; held-out perplexity {quality.per_byte:.3f} per byte,"
        f" {quality.per_token:.2f} per token",
        flush=True,
    )
