"""The tokenizer: the short way to it and transformers' own give the same one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from spanwise.embedded import EMBEDDED
from spanwise.engine.tokenizer import TYPES_TAKEN_AT_THEIR_WORD, Tokenizer, is_plain

TEXT = "def main(argv):\n    return 'Grüße', 1_000, <|eos|>  # ünïcode\n"
MESSAGES = [{"role": "user", "content": "Say hello."}]


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_short_way_gives_what_transformers_chooses(name: str) -> None:
    assert is_plain(EMBEDDED[name])
    own, right = Tokenizer(EMBEDDED[name]), AutoTokenizer.from_pretrained(EMBEDDED[name])
    token_ids = right(TEXT)["input_ids"]
    assert own.encode(TEXT) == token_ids
    for skip in (True, False):
        assert own.decode(token_ids, skip) == right.decode(token_ids, skip_special_tokens=skip)
    chat = right.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)
    assert own.encode_chat(MESSAGES) == chat["input_ids"]
    assert type(own._tokenizer()) is type(right)


@pytest.mark.parametrize("model_type", TYPES_TAKEN_AT_THEIR_WORD)
def test_transformers_does_not_overrule_these_types(model_type: str) -> None:
    assert model_type not in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model_type) != "MistralCommonBackend"


def with_changes(folder: Path, **changes: dict[str, Any]) -> Path:
    shutil.copytree(EMBEDDED["spanwise/tiny-dense"], folder)
    for file, values in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_everything_else_is_left_to_transformers(tmp_path: Path) -> None:
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "type": {"config": {"model_type": "phi3"}},
        "class": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
        "none": {"tokenizer_config": {"tokenizer_class": None}},
        "code": {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["x.y", None]}}},
        "odd": {"tokenizer_config": {"tokenizer_class": 7}},
    }
    for name, change in changes.items():
        assert not is_plain(with_changes(tmp_path / name, **change)), name
    same = with_changes(tmp_path / "same", config={})
    assert is_plain(same)
    (same / "tokenizer.json").unlink()
    assert not is_plain(same)


def test_the_short_way_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from spanwise.engine.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(Path(sys.argv[1]))\n"
        "tokenizer.decode(tokenizer.encode('def main('), True)\n"
        "sys.exit('torch' in sys.modules)"
    )
    folder = str(EMBEDDED["spanwise/tiny-dense"])
    assert subprocess.run([sys.executable, "-c", code, folder]).returncode == 0
