"""A model run with ``quantization="int8"``: smaller, hardly worse, and still nobody's neighbour."""

from __future__ import annotations

import math

import pytest
from scripts.embedded_training.corpus import read_corpus
from transformers import AutoTokenizer

from spanwise import LLM, SamplingParams
from spanwise.embedded import EMBEDDED
from spanwise.types.worker import Quantization

SCORED_TOKENS, WINDOW = 2048, 512


def windows(name: str) -> list[dict[str, list[int]]]:
    """Prompts from the largest file of the standard library that was not trained on."""
    _, texts = read_corpus()
    bos, *ids = AutoTokenizer.from_pretrained(EMBEDDED[name])(max(texts, key=len), verbose=False)[
        "input_ids"
    ]
    starts = range(0, SCORED_TOKENS, WINDOW)
    return [{"prompt_token_ids": [bos, *ids[at : at + WINDOW]]} for at in starts]


def perplexity(name: str, quantization: Quantization | None) -> float:
    """Per token, by the engine's own prompt logprobs."""
    with LLM(name, devices="cpu", quantization=quantization) as llm:
        results = llm.generate(windows(name), SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [entry.logprob for one in results for entry in one.prompt_logprobs or () if entry]
    assert len(scored) == SCORED_TOKENS
    return math.exp(-sum(scored) / SCORED_TOKENS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_perplexity_hardly_rises(name: str) -> None:
    before, after = perplexity(name, None), perplexity(name, "int8")
    assert before != after and after / before < 1.01


@pytest.mark.parametrize(
    ("name", "weights", "rows"), [("tiny-dense", 479_232, 2048), ("tiny-moe", 196_608, 768)]
)
def test_the_layers_shrink_and_the_plan_says_so(name: str, weights: int, rows: int) -> None:
    """Of each of 6 layers the linears' weights, which keep two numbers a row; experts do not."""
    plans = []
    for quantization in (None, "int8"):
        with LLM(f"spanwise/{name}", devices="cpu", quantization=quantization) as llm:
            plans.append(llm.plan)
    assert [plan.dtype for plan in plans] == ["bfloat16", "bfloat16 + int8"]
    before, after = (plan.ranks[0].weight_bytes for plan in plans)
    assert before - after == 6 * (weights - 8 * rows)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    with LLM("spanwise/tiny-dense", devices="cpu", dtype="float32", quantization="int8") as llm:
        prompts = ["def main(", "import os\n\n", "class Queue:\n    def ", "x"]
        greedy = SamplingParams(max_tokens=24, temperature=0)
        together = llm.generate(prompts, greedy)
        alone = [llm.generate(prompt, greedy)[0] for prompt in prompts]
    tokens = [[result.outputs[0].token_ids for result in results] for results in (together, alone)]
    assert tokens[0] == tokens[1]
