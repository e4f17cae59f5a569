"""What the serving face and the engine say to one another about a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from spanwise.types.outputs import FinishReason
from spanwise.types.plan import TaskKind, TokenLogprobs
from spanwise.types.sampling import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to an ``AsyncEngine``.

    ``prompt``: a text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}`` or ``{"messages": ...}``
    (with ``tools``, ``chat_template``, ``chat_template_kwargs``, ``add_generation_prompt``,
    ``continue_final_message`` beside it). ``priority``: the smaller, the sooner. ``timeout_s``: the
    request is dropped if its first step has not begun so long after it came. ``tenant``: whose
    share of the engine it uses. ``cache_salt``: prefixes are shared only among equal salts.
    """

    prompt: str | Mapping[str, Any]
    params: SamplingParams = SamplingParams()
    task: TaskKind = "generate"
    priority: int = 0
    timeout_s: float | None = None
    tenant: str = ""
    cache_salt: str = ""


class ChoiceDelta(msgspec.Struct, frozen=True, array_like=True):
    """What is new of one choice since the last news of it.

    ``text`` is certain: no half character, and nothing that may yet turn out to begin a stop
    string. So tokens may come before their text; at the end all text has come. ``token_ids`` and
    ``logprobs`` (as many, where they were asked for) never come twice.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestNews(msgspec.Struct, frozen=True, array_like=True):
    """What is new of a request. ``finished`` is true in the last news of it, and only there.

    ``prompt_logprobs`` go on where those of the last news ended; the first entry is None (nothing
    comes before the first token). ``pooled`` is the vector of a pooling request.
    """

    deltas: tuple[ChoiceDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    pooled: tuple[float, ...] | None = None
    finished: bool = False


class RankHealth(msgspec.Struct, frozen=True, array_like=True):
    """One rank: ``age_s`` is how long ago its model thread was last heard of."""

    name: str
    device: str
    age_s: float
    healthy: bool


class EngineHealth(msgspec.Struct, frozen=True, array_like=True):
    """Whether the engine's loop and every rank's threads answer."""

    healthy: bool
    ranks: tuple[RankHealth, ...] = ()
    reason: str | None = None


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Observations counted by bucket: ``counts[i]`` are those up to ``bounds[i]``, the last beyond.

    ``counts`` has one entry more than ``bounds``; they are not cumulative.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0


class ReplicaStats(msgspec.Struct, frozen=True, kw_only=True):
    """One replica now. Block counts are those of its fullest cache group."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    num_steps: int = 0
    num_preempted: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine since its start. Times in seconds."""

    replicas: tuple[ReplicaStats, ...] = ()
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = {}
    num_refused: int = 0
    time_to_first_token_s: Histogram = Histogram((), (0,))
    inter_token_latency_s: Histogram = Histogram((), (0,))
    e2e_latency_s: Histogram = Histogram((), (0,))
    queue_time_s: Histogram = Histogram((), (0,))
