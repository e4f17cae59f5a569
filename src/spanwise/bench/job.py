"""What a measurement asks of a fresh process, and what that process answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from spanwise.bench.lengths import Lengths
from spanwise.engine.config import EngineConfig
from spanwise.engine.launch import EnginePlan
from spanwise.types.model import ModelFacts

AttentionMethod = Literal["standard", "flash"]
Device = Literal["cpu", "cuda"]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of random token ids, greedy, each to its full length.

    ``concurrency``: so many are given at a time, the next when one has ended; None: all at once.
    ``is_batch``: they run together, so that one that would have to wait is refused.
    """

    num_requests: int
    input_len: Lengths
    output_len: Lengths
    concurrency: int | None = None
    is_batch: bool = False


class EngineJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start an engine and run the loads on it, all of them ``num_runs`` times.

    Run r draws its prompts from ``seed + r``. ``num_cores``: use only so many of the cores there
    are, for everything. ``one_micro_batch``: one step at a time, also on a pipeline.
    """

    engine: EngineConfig
    loads: tuple[Load, ...]
    num_runs: int = 1
    seed: int = 0
    num_cores: int | None = None
    one_micro_batch: bool = False


class StartJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start ``LLM(model, **arguments)`` and draw one token for a prompt of ``input_len``."""

    model: str
    arguments: dict[str, Any]
    input_len: int


class DescribeJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Say what is known of a model before its weights are read."""

    folder: str
    dtype: str


class AttentionJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Attention over random values, one sequence of ``length`` tokens, no mask.

    ``num_runs`` 0: the memory of one call. Else the times of so many.
    """

    method: AttentionMethod
    length: int
    num_heads: int
    head_dim: int
    dtype: str
    device: Device
    num_runs: int


Job = EngineJob | StartJob | DescribeJob | AttentionJob


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One request; seconds after the load's start."""

    sent_s: float
    first_s: float
    end_s: float
    input_tokens: int
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.output_tokens - 1)


class LoadRun(msgspec.Struct, frozen=True):
    """A load, once, in the order in which requests were given."""

    requests: tuple[RequestTimes, ...]

    @property
    def elapsed_s(self) -> float:
        """From the start to the last token."""
        return max(request.end_s for request in self.requests)

    @property
    def request_rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.elapsed_s

    @property
    def input_rate(self) -> float:
        """Input tokens a second, over the whole load."""
        return sum(request.input_tokens for request in self.requests) / self.elapsed_s

    @property
    def output_rate(self) -> float:
        """Output tokens a second, over the whole load."""
        return sum(request.output_tokens for request in self.requests) / self.elapsed_s


class EngineResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the engine decided, and ``runs[r][l]``: run r of load l."""

    plan: EnginePlan
    runs: tuple[tuple[LoadRun, ...], ...]


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """When something began, on the system's monotonic clock."""

    name: str
    at_s: float


class StartResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The phases of a start, each until the next begins, and when the first token was there."""

    plan: EnginePlan
    phases: tuple[Moment, ...]
    first_token_at_s: float


class DescribeResult(msgspec.Struct, frozen=True, tag=True):
    """What is known of a model."""

    facts: ModelFacts


class AttentionResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Of one call of attention.

    ``input_bytes`` are q, k and v; ``added_bytes`` the most beyond what was there before the call,
    its output included (None where times were wanted).
    """

    input_bytes: int
    added_bytes: int | None
    times_s: tuple[float, ...]


class Told(msgspec.Struct, frozen=True, tag=True):
    """How far it has come."""

    line: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Why there is no result. ``kind`` is the name of a class in ``spanwise.errors``."""

    kind: str
    message: str


Result = EngineResult | StartResult | DescribeResult | AttentionResult
Reply = Result | Told | Broken
