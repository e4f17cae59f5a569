"""Pooled prompts: the last hidden state, or the mean of all, against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.support.driver import drive, give_few_blocks, tokens_of
from tests.support.replica import Replica
from tests.support.tiny_models import prompts, save_tiny_model
from transformers import PreTrainedModel

from spanwise.scheduler.request import SequenceRequest
from spanwise.types.plan import StepPlan, StepResult, TaskKind

PROMPTS = prompts(8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(root: Path) -> tuple[Path, PreTrainedModel]:
    folder = root / "llama"
    return folder, save_tiny_model("llama", folder)


def requests(task: TaskKind, given: Sequence[list[int]] = PROMPTS) -> list[SequenceRequest]:
    return [
        SequenceRequest(sequence_id=index, prompt_token_ids=tuple(prompt), task=task)
        for index, prompt in enumerate(given)
    ]


def pooled(replica: Replica, wanted: Sequence[SequenceRequest]) -> list[torch.Tensor]:
    updates = drive(replica, wanted)
    found = []
    for request in wanted:
        (update,) = updates[request.sequence_id]
        assert update.pooled is not None and update.finish_reason == "stop"
        found.append(torch.tensor(update.pooled))
    return found


@torch.no_grad()
def reference(model: PreTrainedModel, task: TaskKind) -> list[torch.Tensor]:
    states = [model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    return [state.mean(0) if task == "pool_mean" else state[-1] for state in states]


def worst(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("task", ["pool_last", "pool_mean"])
@pytest.mark.parametrize(
    ("family", "pp", "tp"),
    [("llama", 1, 1), ("llama", 2, 2), ("gpt2", 1, 3), ("gemma2", 2, 1), ("mixtral", 1, 2)],
)
def test_pooling_as_transformers(task: TaskKind, family: str, pp: int, tp: int, root: Path) -> None:
    folder = root / f"{family}-{pp}-{tp}-{task}"
    model = save_tiny_model(family, folder)
    replica = Replica(folder, pp=pp, tp=tp, max_step_tokens=7)  # smaller than most prompts
    assert worst(pooled(replica, requests(task)), reference(model, task)) < 1e-4


def test_the_chunks_do_not_show(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    right = reference(model, "pool_mean")
    assert worst(right, reference(model, "pool_last")) > 0.1  # or nothing would be proved
    whole = pooled(Replica(folder, max_step_tokens=256), requests("pool_mean"))
    for budget in (1, 3, 8, 17):
        chunked = pooled(Replica(folder, max_step_tokens=budget), requests("pool_mean"))
        assert worst(chunked, whole) < 1e-5
        assert worst(chunked, right) < 1e-5


def test_every_position_is_computed_of_equal_prompts(
    llama: tuple[Path, PreTrainedModel],
) -> None:
    """What one prompt has left in the cache gives the next one no hidden states."""
    folder, model = llama
    replica = Replica(folder, max_step_tokens=16)
    right = reference(model, "pool_mean")
    for _ in range(2):
        assert worst(pooled(replica, requests("pool_mean")), right) < 1e-5


def test_a_preempted_mean_begins_anew(
    llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generating sequences take the blocks from under a prompt that is half computed."""
    folder, model = llama
    replica = Replica(folder, max_step_tokens=4)
    give_few_blocks(replica, 12)
    introduced: Counter[int] = Counter()
    execute = replica._execute

    def counted(plans: Sequence[StepPlan]) -> list[StepResult]:
        introduced.update(new.sequence_id for plan in plans for new in plan.lanes[0].new)
        return execute(plans)

    monkeypatch.setattr(replica, "_execute", counted)
    growing = [
        SequenceRequest(sequence_id=100 + n, prompt_token_ids=(5 + n,), max_tokens=28)
        for n in range(2)
    ]
    longest_first = reversed(requests("pool_mean"))
    updates = drive(replica, [*growing, *longest_first])
    assert any(introduced[index] > 1 for index in range(len(PROMPTS))), "nothing was preempted"
    assert all(len(tokens_of(updates[request.sequence_id])) == 28 for request in growing)
    found = [torch.tensor(updates[index][-1].pooled) for index in range(len(PROMPTS))]
    assert worst(found, reference(model, "pool_mean")) < 1e-5


def test_another_epoch_begins_anew(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    replica = Replica(folder, max_step_tokens=5)

    def lose_everything(round_: int) -> None:
        if round_ == 3:
            replica.scheduler.restart(1)

    updates = drive(replica, requests("pool_mean"), lose_everything)
    assert replica.scheduler.epoch == 1
    found = [torch.tensor(updates[index][-1].pooled) for index in range(len(PROMPTS))]
    assert worst(found, reference(model, "pool_mean")) < 1e-5


def test_neighbours_of_all_tasks_do_not_touch(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    tasks: list[TaskKind] = ["generate", "pool_mean", "pool_last"]
    mixed = [
        SequenceRequest(
            sequence_id=3 * index + number,
            prompt_token_ids=tuple(prompt),
            task=task,
            max_tokens=6 if task == "generate" else None,
        )
        for index, prompt in enumerate(PROMPTS)
        for number, task in enumerate(tasks)
    ]
    updates = drive(Replica(folder, max_step_tokens=11), mixed)
    alone = drive(Replica(folder), [request for request in mixed if request.task == "generate"])
    for index in range(len(PROMPTS)):
        assert tokens_of(updates[3 * index]) == tokens_of(alone[3 * index])
    for number, task in ((1, "pool_mean"), (2, "pool_last")):
        found = [torch.tensor(updates[3 * i + number][-1].pooled) for i in range(len(PROMPTS))]
        assert worst(found, reference(model, task)) < 1e-5
