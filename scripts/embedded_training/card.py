"""The model card."""

from __future__ import annotations

import math
import sysconfig

from transformers import PreTrainedModel

from .quality import Quality
from .trained import Trained

CARD = """\
---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
tags: [python, tiny, {tag}]
---

# {name}

A tiny {what}. It comes with Spanwise so that every
feature of the engine can be tried with no download. It writes text that looks like Python. It
does not know what the code means: use it to test software, not to get answers.

| | |
|---|---|
| Architecture | `{architecture}` |
| Parameters | {parameters} |
| Layers / heads / key-value heads | {layers} / {heads} / {kv_heads} |
| Vocabulary | {vocabulary} tokens, byte-level BPE |
| Context | 2048 tokens |
| Weights | bfloat16, tied embeddings |

## Quality

| Held-out measure | |
|---|---|
| Perplexity per byte | {per_byte:.3f} |
| Perplexity per token | {per_token:.2f} |
| Bits per byte | {bits:.3f} |

Measured on {held_bytes:,} bytes ({held_tokens:,} tokens) of {held_files} files that were not
trained on, with the bfloat16 weights of this folder: windows of 1024 tokens, at least 512 tokens
of context where the file has them.{note}

## Training

- Data: the source of the Python {python} standard library, {train_bytes:,} bytes, without
  `encodings`, `pydoc_data`, tests and tables. Files are held out by a hash of their path.
  1500 short functions with a docstring are also shown as chats.
- Tokens seen: {tokens:,} ({epochs:.1f} epochs), in {steps:,} steps.
- Time: {minutes:.0f} min on one CPU core that was shared with other work.
- Optimiser: Muon for the matrices, AdamW for the rest, cosine schedule.
- Script: `scripts/train_embedded.py --model {kind}`.

Every text begins with `<|bos|>` and ends with `<|eos|>`. The chat template is ChatML; an answer
ends with `<|im_end|>`.

## Licence

The weights are under the Apache License 2.0. They were trained on the standard library of
CPython, which is under the Python Software Foundation License Version 2; the model can repeat
short parts of it.
"""


def count(model: PreTrainedModel) -> str:
    """The number of parameters, and how many of them a token uses."""
    total = sum(param.numel() for param in model.parameters())
    config = model.config
    if not hasattr(config, "num_experts"):
        return f"{total:,}"
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return f"{total:,}, {total - idle:,} for a token ({config.num_experts} experts, " + (
        f"{config.num_experts_per_tok} for a token)"
    )


def card(trained: Trained, quality: Quality, final: bool) -> str:
    """The model card."""
    moe = trained.kind == "moe"
    config, progress = trained.model.config, trained.progress
    return CARD.format(
        name=f"spanwise/tiny-{trained.kind}",
        kind=trained.kind,
        tag="mixture-of-experts" if moe else "dense",
        what="mixture-of-experts model of Python code" if moe else "dense model of Python code",
        architecture=type(trained.model).__name__,
        parameters=count(trained.model),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        per_byte=quality.per_byte,
        per_token=quality.per_token,
        bits=math.log2(quality.per_byte),
        held_bytes=quality.bytes,
        held_tokens=quality.tokens,
        held_files=len(trained.held) if final else "the first",
        note="" if final else "\nTraining is not finished: this is an early checkpoint.",
        python=sysconfig.get_python_version(),
        train_bytes=trained.num_bytes,
        tokens=progress.tokens,
        epochs=progress.tokens / trained.num_tokens,
        steps=progress.step,
        minutes=progress.seconds / 60,
    )
