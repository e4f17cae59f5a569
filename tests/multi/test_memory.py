"""A rank takes memory for its share of the weights and little more, also while it loads.

The small sister of ``benchmarks/load_memory.py``: 110 million parameters, the common cost of a
process taken off by measuring a model that weighs next to nothing.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spanwise import LLM, SamplingParams
from spanwise.worker.supervisor import Supervisor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 16,
         "num_attention_heads": 10, "num_key_value_heads": 2}  # fmt: skip
TINY = SMALL | {"hidden_size": 40, "intermediate_size": 64, "vocab_size": 512}
_SHARE = 0.55
_SLACK_BYTES = 40 * 10**6  # buffers of a step grow with the model
_SAMPLE_EVERY_S = 0.01


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield patch


@pytest.fixture(scope="module")
def folders(benchmarks: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The small model and the one of next to no weight."""
    write_model = importlib.import_module("load_memory").write_model
    made = [tmp_path_factory.mktemp("weights") for _ in range(2)]
    for folder, sizes in zip(made, (SMALL, TINY), strict=True):
        write_model(folder, num_files=3, **sizes)
    return made


def peaks(folder: Path, supervisor: Supervisor, num_ranks: int, **layout: int) -> tuple[Any, ...]:
    """The weights of each rank, and its peak from the start to the first tokens."""
    memory = importlib.import_module("process_memory").TreeMemory(os.getpid())
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            memory.sample()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        options: dict[str, Any] = {"kv_cache_memory": 32 << 20, "max_model_len": 64}
        devices = f"cpu:{2 if layout else 1}"
        with LLM(
            str(folder),
            devices=devices,
            dtype="bfloat16",
            supervisor=supervisor,
            **options,
            **layout,
        ) as llm:
            llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4))
            weights = [rank.weight_bytes for rank in llm.plan.ranks]
            memory.sample()
    finally:
        done.set()
        watcher.join()
    assert memory.num_samples > 5
    return weights, memory.peak_rank_bytes(num_ranks)


def grown(
    folders: list[Path], supervisor: Supervisor, num_ranks: int, **layout: int
) -> tuple[int, list[int]]:
    """The weights of a rank, and what each rank takes more than with next to no weights."""
    weights, big = peaks(folders[0], supervisor, num_ranks, **layout)
    _, small = peaks(folders[1], supervisor, num_ranks, **layout)
    return weights[0], [one - other for one, other in zip(big, small, strict=True)]


def test_ranks_take_their_share_and_replicas_one_copy(
    folders: list[Path], supervisor: Supervisor
) -> None:
    whole_bytes, (single,) = grown(folders, supervisor, 1)
    limit = _SHARE * whole_bytes + _SLACK_BYTES
    assert single > limit, "the measurement does not see the weights"
    for layout in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        _, ranks = grown(folders, supervisor, 2, **layout)
        assert max(ranks) <= limit, (layout, ranks, limit)
    _, (replicas,) = grown(folders, supervisor, 1, data_parallel_size=2)
    assert replicas <= whole_bytes + _SLACK_BYTES
