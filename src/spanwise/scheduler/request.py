"""What the scheduler is asked for: one generated choice, or one pooled prompt."""

from __future__ import annotations

import msgspec

from spanwise.types.plan import TaskKind
from spanwise.types.sampling import SamplingSpec


class SequenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to run. ``sequence_id`` is never used twice in a scheduler's life.

    ``max_tokens`` None means up to the model's length. Drawing one of ``stop_token_ids`` (EOS ids
    included unless they are to be ignored) ends the sequence. ``output_token_ids`` are tokens
    accepted in an earlier life (another replica, another engine), from which it goes on; they
    count as output, but are not reported again. ``priority``: the smaller, the sooner.
    ``tenant``: whose share of the service it takes. ``deadline_s``, on the caller's clock: it is
    of no use any more unless its first step has been planned by then. ``cache_salt``: computed
    prefixes are shared only among equal salts.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingSpec = SamplingSpec()
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    task: TaskKind = "generate"
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    cache_salt: str = ""
