"""transformers: ``generate`` on one batch, or its continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from answering import Generate, Job, Options, generating, serve


@contextmanager
def start(options: Options) -> Iterator[Callable[[Job], float]]:
    """A model on one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(options["cores"]))
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    how = _continuous if options["continuous"] else _static
    yield generating(how(model, options))


def _static(model: Any, options: Options) -> Generate:
    import torch

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [len(row) - ids.shape[1] for row in made]

    return generate


def _continuous(model: Any, options: Options) -> Generate:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    batching = ContinuousBatchingConfig()
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2
    # Left alone it takes six tenths of the machine's memory.
    batching.num_blocks = (options["kv_cache_gib"] << 30) // (batching.page_size * token_bytes)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        wanted = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        results = model.generate_batch(
            prompts, generation_config=wanted, continuous_batching_config=batching
        )
        return [len(result.generated_tokens) for result in results.values()]

    return generate


if __name__ == "__main__":
    serve(start, ["transformers", "torch"])
