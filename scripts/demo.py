"""Show that a model spread over devices writes the same text as on one: called by scripts/demo.

Each embedded model writes greedily, in float32, on one device and then on two, cut in every way it
can be. Exit code 1 if any layout writes anything else.
"""

from __future__ import annotations

import sys
import time

from spanwise import LLM, SamplingParams

PROMPTS = ["def main(", "import os\n", "class Node:\n    def __init__(self"]
GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
ONE_DEVICE: dict[str, object] = {"devices": "cpu:1"}
LAYOUTS: dict[str, dict[str, object]] = {
    "tp=2, every layer cut in two": {"tensor_parallel_size": 2},
    "pp=2, two stages of layers": {"pipeline_parallel_size": 2},
    "dp=2, two copies side by side": {"data_parallel_size": 2},
}
EXPERTS: dict[str, dict[str, object]] = {
    "ep=2, the experts dealt to two": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
MODELS = {"spanwise/tiny-dense": LAYOUTS, "spanwise/tiny-moe": LAYOUTS | EXPERTS}


def main() -> int:
    """Run everything; the exit code."""
    started = time.monotonic()
    same = [demonstrate(model, layouts) for model, layouts in MODELS.items()]
    verdict = "the same text on every layout" if all(same) else "NOT the same text everywhere"
    print(f"{verdict}; {time.monotonic() - started:.0f} s in all")
    if all(same):
        print('Next: .venv/bin/spanwise run spanwise/tiny-dense "def main(" -tp 2 --max-tokens 64')
    return 0 if all(same) else 1


def demonstrate(model: str, layouts: dict[str, dict[str, object]]) -> bool:
    """Print the text once and a line for each layout; whether all wrote the same."""
    expected, timing = write(model, ONE_DEVICE)
    print(f"== {model} on one device: {timing}\n")
    for prompt, text in zip(PROMPTS, expected, strict=True):
        print("\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines()), end="\n\n")
    same = True
    for name, layout in layouts.items():
        texts, timing = write(model, {"devices": "cpu:2", **layout})
        print(f"   {'same text' if texts == expected else 'OTHER TEXT':10}  {name}: {timing}")
        if texts != expected:
            print(f"               {texts}")
            same = False
    print(flush=True)
    return same


def write(model: str, arguments: dict[str, object]) -> tuple[list[str], str]:
    """The text for every prompt, and what took how long."""
    started = time.monotonic()
    with LLM(model, dtype="float32", kv_cache_memory=64 << 20, **arguments) as llm:  # type: ignore[arg-type]
        ready = time.monotonic()
        outputs = llm.generate(PROMPTS, GREEDY)
        done = time.monotonic()
    texts = [output.outputs[0].text for output in outputs]
    return texts, f"start {ready - started:.1f} s, text {done - ready:.1f} s"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
