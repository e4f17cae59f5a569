"""Starting an engine in this process, with its progress shown."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from spanwise.cli.notes import Notes, plan_line

if TYPE_CHECKING:
    from spanwise.engine.llm import LLM


def start_llm(model: str, arguments: dict[str, Any], notes: Notes) -> LLM:
    """Start the engine and say what was decided. ``arguments`` are those of ``LLM``."""
    silence_libraries()
    from spanwise.engine.llm import LLM

    with notes.starting() as progress:
        llm = LLM(model, **arguments, progress=progress)
    notes.line(plan_line(llm.plan))
    return llm


def silence_libraries() -> None:
    """Keep what libraries say, here and in the workers, out of the user's sight."""
    if os.environ.get("SPANWISE_DEBUG") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of a fork
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
