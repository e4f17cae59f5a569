"""The embedded models are whole, small Hugging Face folders that know some Python."""

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from scripts.embedded_training.corpus import read_corpus
from scripts.embedded_training.quality import measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from spanwise.embedded import EMBEDDED, embedded_folder

NAMES = ("spanwise/tiny-dense", "spanwise/tiny-moe")
TEXT = 'def f(x: int) -> str:\n\t"""Grüße, 世界 🐍"""\n\n    return  f"{x!r}"\n'

each_model = pytest.mark.parametrize("name", NAMES)


@cache
def load(name: str) -> tuple[Any, Any]:
    """The model, in fp32 because few CPUs are fast in bf16, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED[name], dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(EMBEDDED[name])


@cache
def held_out() -> str:
    """The largest file of the standard library that was not trained on."""
    _, texts = read_corpus()
    return max(texts, key=len)


def test_names() -> None:
    assert tuple(EMBEDDED) == NAMES
    assert embedded_folder("spanwise/tiny-moe") == EMBEDDED["spanwise/tiny-moe"]
    assert embedded_folder("meta/llama") is None


@each_model
def test_folder_is_small_and_whole(name: str) -> None:
    folder = EMBEDDED[name]
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert files.keys() >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@each_model
def test_weights_are_bf16(name: str) -> None:
    with safe_open(EMBEDDED[name] / "model.safetensors", framework="pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    assert AutoModelForCausalLM.from_pretrained(EMBEDDED[name]).dtype == torch.bfloat16


def test_moe_has_experts() -> None:
    config = json.loads((EMBEDDED["spanwise/tiny-moe"] / "config.json").read_text())
    assert config["num_experts"] >= 8
    assert config["num_experts_per_tok"] == 2


@each_model
def test_tokenizer_round_trip(name: str) -> None:
    _, tokenizer = load(name)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT


@each_model
def test_chat_template(name: str) -> None:
    _, tokenizer = load(name)
    chat = [{"role": "user", "content": "Write a function."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ("<|bos|><|im_start|>user\nWrite a function.<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


@each_model
def test_generation_stops_at_end_of_text_and_of_turn(name: str) -> None:
    model, tokenizer = load(name)
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends


def stated_perplexity(name: str) -> float:
    stated = re.search(
        r"Perplexity per byte \| ([\d.]+)", (EMBEDDED[name] / "README.md").read_text()
    )
    assert stated
    return float(stated[1])


@each_model
def test_card_states_perplexity(name: str) -> None:
    card = (EMBEDDED[name] / "README.md").read_text()
    assert stated_perplexity(name) > 1
    assert re.search(r"Perplexity per token \| [\d.]+", card)
    assert "license: apache-2.0" in card
    assert "/work" not in card and "/tmp" not in card


@each_model
def test_perplexity_on_held_out_text(name: str) -> None:
    model, tokenizer = load(name)
    quality = measure(model, tokenizer, [held_out()], 20_000)
    # The card speaks of all held-out text; one file of it cannot be far off.
    assert quality.per_byte == pytest.approx(stated_perplexity(name), rel=0.1)


@each_model
def test_greedy_output_reads_like_python(name: str) -> None:
    model, tokenizer = load(name)
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert re.match(r"def main\([^\n]*\):\n {4,8}\S", text), text
