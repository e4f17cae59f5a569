"""On a card with 8-bit floats linears are as near to exact ones as the format allows.

``tests/cpu/test_fp8.py`` runs the same by torch's kernel for CPUs.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.cpu.test_int8_engine import SCORED_TOKENS, windows
from tests.support.fp8 import SHAPES, check_product, normal, rounding_ratio

from spanwise import LLM, SamplingParams
from spanwise.device.devices import cuda_capabilities
from spanwise.device.fp8 import Fp8Linear
from spanwise.embedded import EMBEDDED
from spanwise.types.worker import Quantization

CARD = torch.device("cuda", 0)


def has_fp8() -> bool:
    return bool(cuda_capabilities()) and cuda_capabilities()[0] >= (8, 9)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_fp8(), reason="card 0 has no 8-bit floats"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_product_is_off_by_more_than_the_format_allows(shape: tuple[int, int]) -> None:
    check_product(shape, "cuda:0")


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_the_product_is_that_of_the_nearest_numbers(rows: int) -> None:
    weight, hidden = normal(512, 1280, device="cuda:0"), normal(rows, 1280, device="cuda:0")
    layer = Fp8Linear(weight)
    assert rounding_ratio(layer, hidden, weight) < 1.5
    layer._steps *= 1.01
    assert rounding_ratio(layer, hidden, weight) > 3


def test_a_bias_and_rows_that_stand_apart() -> None:
    weight, bias = normal(33, 100, device="cuda:0"), normal(33, seed=2, device="cuda:0")
    hidden = normal(5, 200, device="cuda:0")[:, :100]
    plain = Fp8Linear(weight)(hidden).double()
    error = (Fp8Linear(weight, bias)(hidden).double() - (plain + bias.double())).abs()
    assert bool((error <= (plain.abs() * 2 + bias.double().abs()) * 2**-8).all())


def test_a_call_is_recorded() -> None:
    """As a decode step is: nothing in it waits for the card."""
    layer, hidden = Fp8Linear(normal(256, 192, device="cuda:0")), normal(4, 192, device="cuda:0")
    wanted = layer(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(hidden)
    graph.replay()
    assert torch.equal(found, wanted)


def perplexity(name: str, quantization: Quantization | None) -> float:
    """Per token, by the engine's own prompt logprobs."""
    with LLM(name, devices="cuda:0", dtype="bfloat16", quantization=quantization) as llm:
        results = llm.generate(windows(name), SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [entry.logprob for one in results for entry in one.prompt_logprobs or () if entry]
    assert len(scored) == SCORED_TOKENS
    return math.exp(-sum(scored) / SCORED_TOKENS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_perplexity_hardly_rises(name: str) -> None:
    before, after = perplexity(name, None), perplexity(name, "fp8")
    assert before != after and after / before < 1.01
