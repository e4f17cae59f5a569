"""What a request may ask for beside tokens: scores of the prompt, pooling, stops, penalties."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.replica import Replica
from tests.support.tiny_models import prompts, save_tiny_model

from spanwise import LLM, SamplingParams
from spanwise.errors import EngineError
from spanwise.scheduler.request import SequenceRequest
from spanwise.types.sampling import SamplingSpec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("spanwise/tiny-dense", dtype="float32", max_model_len=256) as llm:
        yield llm


@pytest.mark.parametrize(("family", "pp", "tp"), [("llama", 1, 1), ("llama", 2, 2), ("gpt2", 1, 3)])
def test_prompt_logprobs_and_pooling(family: str, pp: int, tp: int, root: Path) -> None:
    folder = root / f"{family}-{pp}-{tp}"
    model = save_tiny_model(family, folder)
    prompt = prompts()[7]
    # A budget smaller than the prompt: scores come chunk by chunk.
    replica = Replica(folder, pp=pp, tp=tp, max_step_tokens=16)
    scoring = SamplingSpec(prompt_logprobs=3)
    replica.scheduler.add(
        SequenceRequest(
            sequence_id=0, prompt_token_ids=tuple(prompt), sampling=scoring, max_tokens=2
        )
    )
    replica.scheduler.add(
        SequenceRequest(sequence_id=1, prompt_token_ids=tuple(prompt), task="pool_last")
    )
    scores, pooled = [], None
    while replica.scheduler.num_waiting or replica.scheduler.num_running:
        plans = []
        while (plan := replica.scheduler.next_plan()) is not None:
            plans.append(plan)
        for result in replica._execute(plans):
            for update in replica.scheduler.accept(result):
                scores += update.prompt_logprobs
                pooled = update.pooled or pooled
    with torch.no_grad():
        given = model(torch.tensor([prompt]), output_hidden_states=True)
    right = given.logits[0].log_softmax(-1)
    assert [score.token_id for score in scores] == prompt[1:]
    for position, score in enumerate(scores):
        assert score.logprob == pytest.approx(right[position, score.token_id].item(), abs=1e-4)
        top = right[position].topk(3)
        assert list(score.top_ids) == top.indices.tolist()
        assert score.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
    assert pooled == pytest.approx(given.hidden_states[-1][0, -1].tolist(), abs=1e-4)


def test_a_stop_string_ends_the_text_before_it(tiny: LLM) -> None:
    free = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (whole,) = tiny.generate("import os\n", free)
    text = whole.outputs[0].text
    stop = text[10:14]
    stopped = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=stop)
    (output,) = tiny.generate("import os\n", stopped)
    choice = output.outputs[0]
    assert choice.text == text[: text.find(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert len(choice.token_ids) < 40
    (again,) = tiny.generate("import os\n", free)
    assert again.outputs == whole.outputs


def test_a_stop_token_stands_among_the_ids_and_not_in_the_text(tiny: LLM) -> None:
    free = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    (whole,) = tiny.generate("def main(", free)
    token = whole.outputs[0].token_ids[5]
    first = whole.outputs[0].token_ids.index(token)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=[token])
    (output,) = tiny.generate("def main(", params)
    choice = output.outputs[0]
    assert choice.token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    assert whole.outputs[0].text.startswith(choice.text)
    late = SamplingParams(
        max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=[token], min_tokens=12
    )
    (output,) = tiny.generate("def main(", late)
    assert token not in output.outputs[0].token_ids[:12]


def test_choices_differ_and_repeat_with_their_seed(tiny: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=11, ignore_eos=True)
    first, second = tiny.generate(["x = ", "x = "], params)
    assert first.outputs == second.outputs
    assert [choice.index for choice in first.outputs] == [0, 1, 2]
    assert len({choice.token_ids for choice in first.outputs}) == 3
    one = SamplingParams(n=1, max_tokens=12, temperature=1.0, seed=11, ignore_eos=True)
    assert tiny.generate("x = ", one)[0].outputs[0] == first.outputs[0]


def test_a_bias_decides(tiny: LLM) -> None:
    params = SamplingParams(
        max_tokens=3, temperature=0.0, ignore_eos=True, logit_bias={77: 100.0}, logprobs=2
    )
    (output,) = tiny.generate("x = ", params)
    choice = output.outputs[0]
    assert choice.token_ids == (77, 77, 77)
    assert choice.logprobs is not None
    assert all(len(report.top_ids) == 2 and report.token_id == 77 for report in choice.logprobs)
    assert all(report.logprob < 0 for report in choice.logprobs)


def test_streaming_grows_and_ends_like_the_whole(tiny: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    seen = list(tiny.stream("class Node:\n", params))
    texts = [output.outputs[0].text for output in seen]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert seen[-1].finished and not seen[0].finished
    (whole,) = tiny.generate("class Node:\n", params)
    assert whole.outputs == seen[-1].outputs


def test_an_interrupted_step_ends_the_engine_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("spanwise/tiny-dense", dtype="float32", max_model_len=64) as llm:

        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(llm._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("def main(")
        with pytest.raises(EngineError, match="shut down"):
            llm.generate("def main(")
