"""The layouts every family is tried on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.replica import MAX_LEN

from spanwise import LLM
from spanwise.worker.supervisor import Supervisor

# dp, pp, tp, whole experts
LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "1": (1, 1, 1, False),
    "tp2": (1, 1, 2, False),
    "tp3": (1, 1, 3, False),
    "tp4": (1, 1, 4, False),
    "pp2": (1, 2, 1, False),
    "pp3": (1, 3, 1, False),
    "dp2": (2, 1, 1, False),
    "tp2-pp2": (1, 2, 2, False),
    "dp2-tp2": (2, 1, 2, False),
    "dp2-pp2-tp2": (2, 2, 2, False),
}
EXPERT_LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "ep2": (1, 1, 2, True),
    "ep4": (1, 1, 4, True),
    "pp2-ep2": (1, 2, 2, True),
}
ALL_LAYOUTS = LAYOUTS | EXPERT_LAYOUTS


@contextmanager
def running(folder: Path, layout: str, supervisor: Supervisor, **options: Any) -> Iterator[LLM]:
    """The model on a layout, as processes; on CPU devices unless ``devices`` says otherwise."""
    dp, pp, tp, whole_experts = ALL_LAYOUTS[layout]
    limits = {"max_model_len": MAX_LEN, "block_size": 4, "max_step_tokens": 24, "max_num_seqs": 8}
    with LLM(
        str(folder),
        data_parallel_size=dp,
        pipeline_parallel_size=pp,
        tensor_parallel_size=tp,
        enable_expert_parallel=whole_experts,
        dtype="float32",
        supervisor=supervisor,
        **{"devices": f"cpu:{dp * pp * tp}"} | limits | options,
    ) as llm:
        yield llm
