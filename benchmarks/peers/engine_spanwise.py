"""Spanwise, of this tree, with default settings but for the size of its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from answering import Job, Options, generating, serve


@contextmanager
def start(options: Options) -> Iterator[Callable[[Job], float]]:
    """An LLM on as many devices as there are cores for it."""
    from spanwise import LLM, SamplingParams

    with LLM(
        options["model"],
        devices=f"cpu:{len(options['cores'])}",
        dtype="bfloat16",
        kv_cache_memory=options["kv_cache_gib"] << 30,
        **options["layout"],
    ) as llm:

        def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
            return [len(output.outputs[0].token_ids) for output in outputs]

        yield generating(generate)


if __name__ == "__main__":
    serve(start, ["spanwise"])
