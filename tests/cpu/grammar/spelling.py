"""What the tokens of a tokenizer spell, and grammars of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spanwise.types.sampling import Grammar


def write_configs(folder: Path, **generation: Any) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text(json.dumps(generation))


def spellings(tokenizer: Tokenizer) -> list[str]:
    pieces = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    for mark, text in (("Ġ", " "), ("▁", " "), ("Ċ", "\n"), ("<0x0A>", "\n")):
        pieces = [text if piece == mark else piece for piece in pieces]
    return pieces


def regex(text: str) -> Grammar:
    return Grammar("regex", text)
