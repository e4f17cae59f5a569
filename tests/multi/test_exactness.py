"""On every layout the tokens of transformers, and logits within 1e-4; drawn tokens likewise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.compare import LOGIT_TOLERANCE, NUM_TOKENS, reference_of, worst_difference
from tests.support.layouts import ALL_LAYOUTS, EXPERT_LAYOUTS, LAYOUTS, running
from tests.support.tiny_models import FAMILIES, MIXTURES, VOCAB

from spanwise import SamplingParams
from spanwise.worker.supervisor import Supervisor

# Run always; the rest of the matrix stands behind --full.
QUICK = {
    "llama": ("tp2", "tp3", "pp3", "dp2", "tp2-pp2", "dp2-pp2-tp2"),
    "qwen3_moe": ("tp2", "pp2", "ep2", "ep4", "pp2-ep2"),
    "deepseek_v3": ("tp3", "pp2-ep2"),
    "gpt_oss": ("tp4", "ep2", "pp2"),
    "gemma2": ("1", "tp2", "pp3"),
    "gpt2": ("tp3", "pp2"),
    "phi3": ("1", "tp2", "pp2"),
    "mistral": ("tp2-pp2",),
    "olmo2": ("tp2", "tp3"),
    "mixtral": ("ep2", "tp2-pp2"),
    "qwen2": ("dp2-tp2",),
    "qwen3": ("tp4",),
}
MATRIX = [
    pytest.param(
        family,
        layout,
        marks=() if layout in QUICK[family] else pytest.mark.full,
        id=f"{family}-{layout}",
    )
    for family in FAMILIES
    for layout in (ALL_LAYOUTS if family in MIXTURES else LAYOUTS)
]


@pytest.mark.parametrize(("family", "layout"), MATRIX)
def test_greedy_tokens_and_logits_equal_transformers(
    family: str, layout: str, models: Path, supervisor: Supervisor
) -> None:
    right = reference_of(family, models)
    prompts = [{"prompt_token_ids": prompt} for prompt in right.prompts]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB)
    with running(right.folder, layout, supervisor) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    tokens = [list(output.token_ids) for output in outputs]
    assert tokens == right.tokens
    assert worst_difference(tokens, [o.logprobs or () for o in outputs], right) < LOGIT_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_drawn_tokens_are_the_same_on_every_layout_and_in_any_order(
    family: str, models: Path, supervisor: Supervisor
) -> None:
    right = reference_of(family, models)
    wanted = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True, n=1 + seed % 2)
        for seed in range(len(right.prompts))
    ]
    layouts = ("1", "tp3", "pp2", "dp2-tp2", *(("pp2-ep2",) if family in MIXTURES else ()))
    drawn = {}
    for turn, layout in enumerate(layouts):
        # Another order of the batch on every layout.
        order = [(i * 3 + turn) % len(wanted) for i in range(len(wanted))]
        with running(right.folder, layout, supervisor) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": right.prompts[i]} for i in order],
                [wanted[i] for i in order],
            )
        answers = {
            i: [choice.token_ids for choice in output.outputs]
            for i, output in zip(order, outputs, strict=True)
        }
        drawn[layout] = [answers[i] for i in range(len(wanted))]
    assert all(answer == drawn["1"] for answer in drawn.values())
    two_choices = [choices for choices in drawn["1"] if len(choices) == 2]
    assert two_choices and all(first != second for first, second in two_choices)


def test_layers_by_hand_change_nothing(models: Path, supervisor: Supervisor) -> None:
    right = reference_of("llama", models)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with running(right.folder, "tp2-pp2", supervisor, pp_layers=(1, 3)) as llm:
        assert "1+3" in llm.plan.layout
        outputs = llm.generate([{"prompt_token_ids": p} for p in right.prompts], params)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [t[:8] for t in right.tokens]


def test_every_layout_of_the_issue_is_in_the_matrix() -> None:
    assert set(QUICK) == set(FAMILIES)
    assert all(set(layouts) <= set(ALL_LAYOUTS) for layouts in QUICK.values())
    assert {layout for layouts in QUICK.values() for layout in layouts} == set(ALL_LAYOUTS)
    assert set(EXPERT_LAYOUTS) == {"ep2", "ep4", "pp2-ep2"}
