"""What the LM Evaluation Harness makes of a server: one JSON object of each sample's results.

To be run in the folder of the tasks, which look for their examples there.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL = sys.argv[1], sys.argv[2]
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
SCORED = ["score", "choose", "rolling"]


def main() -> None:
    """Run everything, quietly."""
    with contextlib.redirect_stdout(sys.stderr):
        said = {
            "one by one": completions(batch_size=1),
            "in batches": completions(batch_size=4),
            "at once": completions(batch_size=2, num_concurrent=3),
            "chat": chat(),
        }
    print(json.dumps(said | {"has torch": "torch" in sys.modules}))


def completions(batch_size: int, **arguments: Any) -> dict[str, list[Any]]:
    """Scores and texts by the API of completions; the server makes the tokens."""
    return evaluate(
        "local-completions",
        [*SCORED, "write"],
        batch_size=batch_size,
        model_args={"base_url": f"{URL}/v1/completions", "model": MODEL, **arguments},
    )


def chat() -> dict[str, list[Any]]:
    """Texts by the API of chats, which gives no scores of what it is given."""
    return evaluate(
        "local-chat-completions",
        ["write"],
        apply_chat_template=True,
        model_args={
            "base_url": f"{URL}/v1/chat/completions",
            "model": MODEL,
            "eos_string": "<|im_end|>",
        },
    )


def evaluate(kind: str, tasks: list[str], **options: Any) -> dict[str, list[Any]]:
    """What came back for each example of each task."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=kind,
        tasks=tasks,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return {
        task: [[answers[0] for answers in sample["resps"]] for sample in samples]
        for task, samples in found["samples"].items()
    }


if __name__ == "__main__":
    main()
