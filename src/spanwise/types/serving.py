"""What the serving face and the engine say to one another about a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from spanwise.types.outputs import FinishReason
from spanwise.types.plan import TaskKind, TokenLogprobs
from spanwise.types.resume import Resume
from spanwise.types.sampling import SamplingParams


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to an ``AsyncEngine``.

    ``prompt``: a text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}`` or ``{"messages": ...}``
    (with ``tools``, ``chat_template``, ``chat_template_kwargs``, ``add_generation_prompt``,
    ``continue_final_message`` beside it). ``priority``: the smaller, the sooner. ``timeout_s``: the
    request is dropped if its first step has not begun so long after it came. ``tenant``: whose
    share of the engine it uses. ``cache_salt``: prefixes are shared only among equal salts.
    ``resume``: it runs on when nobody reads its news, and may be asked for again. ``is_further``:
    it belongs with one that was admitted, and is not refused for the time it will have to wait.
    """

    prompt: str | Mapping[str, Any]
    params: SamplingParams = SamplingParams()
    task: TaskKind = "generate"
    priority: int = 0
    timeout_s: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    resume: Resume | None = None
    is_further: bool = False


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
    comes before the first token). ``pooled`` is the vector of a pooling request. ``at`` is when the
    last of it was computed (Unix time).
    """

    deltas: tuple[ChoiceDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    pooled: tuple[float, ...] | None = None
    finished: bool = False
    at: int = 0


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
    """One replica now, and since its start. Block counts are those of its fullest cache group.

    ``prompt_tokens`` are those of prompts that are computed, of which ``cached_tokens`` were found.
    ``finished`` counts sequences by reason; ``histograms`` are named as their metrics are.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    num_steps: int = 0
    num_preempted: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = {}
    histograms: dict[str, Histogram] = {}


class DeviceStats(msgspec.Struct, frozen=True, kw_only=True):
    """The device of one rank; ``device`` is its name, the numbers say where the rank stands.

    ``utilization`` is the share of about the last second that the rank spent in steps, waits for
    other ranks included; ``busy_s`` all such time. Memory: see ``DeviceReading``; of what is in use
    ``weight_bytes`` are weights, and at most ``cache_bytes`` the KV cache.
    """

    device: str
    replica: int
    stage: int
    rank: int
    utilization: float
    busy_s: float
    memory_used_bytes: int
    memory_total_bytes: int
    weight_bytes: int
    cache_bytes: int


class CacheInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache of each replica, as it was planned."""

    block_size: int
    num_tokens: int
    prefix_caching: bool


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine now, and since its start. ``num_refused`` requests found no room."""

    replicas: tuple[ReplicaStats, ...] = ()
    devices: tuple[DeviceStats, ...] = ()
    cache: CacheInfo | None = None
    num_refused: int = 0
