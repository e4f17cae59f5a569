"""What transformers itself makes of the embedded model, to hold a server's answers against."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from spanwise.embedded import EMBEDDED

_FOLDER = EMBEDDED["spanwise/tiny-dense"]
Message = dict[str, Any]


@cache
def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(_FOLDER, dtype=torch.float32).eval()


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_FOLDER)


def token_ids(text: str, *, special: bool = True) -> list[int]:
    """The tokens of a text, after the one that begins it unless not ``special``."""
    ids: list[int] = _tokenizer()(text, add_special_tokens=special)["input_ids"]
    return ids


def greedy(prompt: str | list[Message], num_tokens: int, *, special: bool = True) -> str:
    """The likeliest tokens after a text or a conversation, one after the other."""
    if isinstance(prompt, str):
        return _greedy(tuple(token_ids(prompt, special=special)), num_tokens)
    asked = _tokenizer().apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return _greedy(tuple(token_ids(asked, special=False)), num_tokens)


@cache
def _greedy(ids: tuple[int, ...], num_tokens: int) -> str:
    with torch.no_grad():
        drawn = _model().generate(torch.tensor([ids]), do_sample=False, max_new_tokens=num_tokens)
    text: str = _tokenizer().decode(drawn[0, len(ids) :], skip_special_tokens=True)
    return text


def logprobs(ids: list[int]) -> list[float]:
    """The log probability of each token after those before it; there is none for the first."""
    scores = _scores(ids).gather(1, torch.tensor(ids[1:])[:, None])
    found: list[float] = scores[:, 0].tolist()
    return found


def likeliest(ids: list[int]) -> list[int]:
    """The likeliest token in place of each but the first."""
    found: list[int] = _scores(ids).argmax(-1).tolist()
    return found


def _scores(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = _model()(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)


def embedding(ids: list[int]) -> list[float]:
    """The last hidden state of the last token, of length one."""
    with torch.no_grad():
        states = _model().model(torch.tensor([ids])).last_hidden_state
    found: list[float] = normalize(states[0, -1], dim=0).tolist()
    return found
