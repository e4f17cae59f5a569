"""What is measured, and what is compared with what."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from answering import Job
from load_memory import MODEL, tensor_shapes

_WEIGHT_BYTES = 2
_STEPS = 64
_WARM_PROMPTS, _WARM_TOKENS = 8, 4


@dataclass(frozen=True)
class Workload:
    """Requests that come at once, all of one length, of random tokens."""

    num_prompts: int
    num_input: int
    num_output: int

    def job(self, seed: str) -> Job:
        """With prompts that no other seed gives: nobody may find them in a prefix cache."""
        chance = random.Random(seed)
        prompts = [
            [chance.randrange(5, MODEL["vocab_size"]) for _ in range(self.num_input)]
            for _ in range(self.num_prompts)
        ]
        return {"do": "generate", "prompts": prompts, "max_tokens": self.num_output}

    def small(self) -> Workload:
        """Enough of it to have everything in place."""
        return Workload(
            min(self.num_prompts, _WARM_PROMPTS),
            self.num_input,
            min(self.num_output, _WARM_TOKENS),
        )


@dataclass(frozen=True)
class Measure:
    """Jobs that an engine does one after the other, and what their seconds say.

    ``shown`` writes the figure, which is in seconds, as one reads it.
    """

    workloads: tuple[Workload | Job, ...]
    shown: Callable[[float], str]
    figure: Callable[..., float] = float

    def jobs(self, seed: str) -> list[Job]:
        """The same for every engine that is asked with this seed."""
        return [
            each.job(f"{seed} {number}") if isinstance(each, Workload) else each
            for number, each in enumerate(self.workloads)
        ]

    def warm_up(self, seed: str) -> list[Job]:
        """A small part of it."""
        return [
            each.small().job(f"{seed} {number}") if isinstance(each, Workload) else each
            for number, each in enumerate(self.workloads)
        ]


def step_weight_bytes() -> int:
    """Of the weights that a decode step reads: all but the embedding table."""
    shapes = tensor_shapes(MODEL)
    sizes = [
        shape[0] * (shape[1] if len(shape) == 2 else 1)
        for name, shape in shapes.items()
        if "embed_tokens" not in name
    ]
    return _WEIGHT_BYTES * sum(sizes)


def _decode(batch: int) -> Measure:
    """The time of a further token: of a long answer less a short one."""
    return Measure(
        (Workload(batch, 32, 1 + _STEPS), Workload(batch, 32, 1)),
        _milliseconds,
        lambda long, short: (long - short) / _STEPS,
    )


def _rate(workload: Workload, num_tokens: int) -> Measure:
    total = workload.num_prompts * num_tokens
    return Measure((workload,), lambda seconds: f"{total / seconds:.0f} tok/s")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


LONG_PROMPTS, LONG_ANSWERS = "48 x 256 in, 8 out", "48 x 64 in, 64 out"

MEASURES = {
    "decode, batch 1": _decode(1),
    "decode, batch 8": _decode(8),
    "linears, batch 1": Measure(({"do": "linears", "batch": 1},), _milliseconds),
    "linears, batch 8": Measure(({"do": "linears", "batch": 8},), _milliseconds),
    "weights read": Measure(({"do": "read", "bytes": step_weight_bytes()},), _milliseconds),
    "prefill 16 x 256": _rate(Workload(16, 256, 1), 256),
    LONG_PROMPTS: _rate(Workload(48, 256, 8), 256),
    LONG_ANSWERS: _rate(Workload(48, 64, 64), 64),
}


@dataclass(frozen=True)
class Comparison:
    """One engine's speed over another's on a measure, and how much it must be.

    ``theirs_by``: what the other is measured by, where that is something else. Engines of one
    ``group`` are loaded together and asked in turns.
    """

    row: str
    group: str
    measure: str
    ours: str
    theirs: str
    at_least: float | None = None
    theirs_by: str | None = None

    @property
    def asked(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Who is asked what, as (engine, measure)."""
        return (self.ours, self.measure), (self.theirs, self.theirs_by or self.measure)


def _on_one(
    row: str, measure: str, theirs: str, at_least: float | None = None, by: str | None = None
) -> Comparison:
    return Comparison(row, "one device", measure, "spanwise", theirs, at_least, by)


# As many at a time as there is memory for.
_GROUPS = {"pp=2": "pp=2", "tp=2": "tp=2 and dp=2", "dp=2": "tp=2 and dp=2"}


def _spread(layout: str, measure: str, gain: float) -> Comparison:
    return Comparison("layouts", _GROUPS[layout], measure, f"spanwise {layout}", "spanwise", gain)


def _same(layout: str, measure: str, at_least: float) -> Comparison:
    ours, theirs = f"spanwise {layout}", f"vllm {layout}"
    return Comparison("layouts", _GROUPS[layout], measure, ours, theirs, at_least)


COMPARISONS = (
    _on_one("decode", "decode, batch 1", "vllm", 0.95),
    _on_one("decode", "decode, batch 8", "vllm", 0.88),
    _on_one("decode", "decode, batch 1", "transformers", 2.2),
    _on_one("decode", "decode, batch 8", "transformers", 2.2),
    _on_one("decode", "decode, batch 1", "hardware", by="linears, batch 1"),
    _on_one("decode", "decode, batch 8", "hardware", by="linears, batch 8"),
    _on_one("decode", "decode, batch 1", "hardware", 0.75, "weights read"),
    Comparison("int8", "int8", "decode, batch 1", "spanwise int8", "spanwise", 1.3),
    Comparison("int8", "int8", "decode, batch 8", "spanwise int8", "spanwise", 1.3),
    _on_one("prefill", "prefill 16 x 256", "vllm", 1.0),
    _on_one("prefill", "prefill 16 x 256", "transformers"),
    _on_one("serving", LONG_PROMPTS, "vllm", 0.95),
    _on_one("serving", LONG_ANSWERS, "vllm", 0.9),
    _on_one("serving", LONG_PROMPTS, "transformers"),
    _on_one("serving", LONG_ANSWERS, "transformers"),
    _on_one("serving", LONG_PROMPTS, "transformers continuous"),
    _on_one("serving", LONG_ANSWERS, "transformers continuous"),
    _spread("pp=2", LONG_PROMPTS, 1.75),
    _spread("pp=2", LONG_ANSWERS, 1.5),
    _same("pp=2", LONG_PROMPTS, 1.0),
    _same("pp=2", LONG_ANSWERS, 1.0),
    _spread("tp=2", LONG_PROMPTS, 1.8),
    _spread("tp=2", LONG_ANSWERS, 1.8),
    _same("tp=2", LONG_PROMPTS, 0.9),
    _same("tp=2", LONG_ANSWERS, 0.9),
    _spread("dp=2", LONG_PROMPTS, 1.85),
    _spread("dp=2", LONG_ANSWERS, 1.65),
)
