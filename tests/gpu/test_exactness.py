"""On cards the tokens of transformers on the CPU, in fp32: ranks alone, and sharing one card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.compare import NUM_TOKENS, reference_of, worst_difference
from tests.support.layouts import ALL_LAYOUTS, EXPERT_LAYOUTS, running
from tests.support.tiny_models import FAMILIES, MIXTURES, VOCAB

from spanwise import SamplingParams
from spanwise.worker.supervisor import Supervisor

pytestmark = pytest.mark.gpu

LOGIT_TOLERANCE = 1e-3  # another device adds in another order; TF32 would miss it by far
MOST_ON_ONE_CARD = 4


def num_ranks(layout: str) -> int:
    dp, pp, tp, _ = ALL_LAYOUTS[layout]
    return dp * pp * tp


MATRIX = [
    (family, layout)
    for family in FAMILIES
    for layout in ALL_LAYOUTS
    if num_ranks(layout) <= MOST_ON_ONE_CARD
    and (layout not in EXPERT_LAYOUTS or family in MIXTURES)
]


def check_greedy(
    family: str, layout: str, devices: str, models: Path, supervisor: Supervisor
) -> None:
    right = reference_of(family, models)
    prompts = [{"prompt_token_ids": prompt} for prompt in right.prompts]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB)
    with running(right.folder, layout, supervisor, devices=devices) as llm:
        assert {rank.device.partition(":")[0] for rank in llm.plan.ranks} == {"cuda"}
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    tokens = [list(output.token_ids) for output in outputs]
    assert tokens == right.tokens
    assert worst_difference(tokens, [o.logprobs or () for o in outputs], right) < LOGIT_TOLERANCE


@pytest.mark.parametrize(("family", "layout"), MATRIX)
def test_ranks_sharing_a_card(
    family: str, layout: str, models: Path, supervisor: Supervisor
) -> None:
    ranks = num_ranks(layout)
    devices = f"cuda:0*{ranks}" if ranks > 1 else "cuda:0"
    check_greedy(family, layout, devices, models, supervisor)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_ranks_with_a_card_each(family: str, models: Path, supervisor: Supervisor) -> None:
    """Every layout that takes several of the cards there are; NCCL joins the ranks."""
    cards = torch.cuda.device_count()
    layouts = [name for name in ALL_LAYOUTS if 1 < num_ranks(name) <= cards]
    for layout in layouts:
        if layout in EXPERT_LAYOUTS and family not in MIXTURES:
            continue
        devices = "cuda:" + ",".join(map(str, range(num_ranks(layout))))
        check_greedy(family, layout, devices, models, supervisor)


def test_drawn_tokens_are_those_of_the_cpu(models: Path, supervisor: Supervisor) -> None:
    right = reference_of("llama", models)
    prompts = [{"prompt_token_ids": prompt} for prompt in right.prompts]
    params = [
        SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, top_k=50, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    drawn = []
    for layout, devices in (("1", "cpu"), ("1", "cuda:0"), ("tp2-pp2", "cuda:0*4")):
        with running(right.folder, layout, supervisor, devices=devices) as llm:
            outputs = llm.generate(prompts, params)
        drawn.append([output.outputs[0].token_ids for output in outputs])
    assert drawn[0] == drawn[1] == drawn[2]
