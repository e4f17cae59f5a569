"""What the scheduler of one replica may spend."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from spanwise.errors import InputError
from spanwise.types.cache import CacheLayout

Batching = Literal["continuous", "dynamic", "static"]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one replica.

    ``max_step_tokens`` is the token budget of a step. ``num_micro_batches`` is how many groups
    the decoding sequences are split into: as many as the pipeline has stages. ``max_in_flight``
    bounds the steps planned and not yet answered: 2 on one stage, ``num_micro_batches`` or more
    on a pipeline (twice that hides the way to the engine and back). A sequence that grows past
    one of ``recompute_lengths`` is computed anew from position 0 (long-RoPE).
    ``min_chunk_tokens``: on a pipeline prompts are cut so that every stage has work, but not
    into chunks smaller than this, since each chunk reads all weights again; only for as long as
    measured times do not tell better.
    ``prefix_caching``: blocks whose tokens were computed before are shared, not computed again.
    ``batching``: ``continuous`` lets a sequence join whenever there is room. The other two let
    ``batch_size`` sequences (``max_num_seqs`` unless given) begin together, and none more until
    all have ended; fewer than that, ``dynamic`` when the oldest has waited for
    ``batch_window_s``, ``static`` when for so long none has come and none has run.
    Raises InputError for a limit that leaves no way to run.
    """

    max_step_tokens: int
    max_num_seqs: int
    max_model_len: int
    cache: CacheLayout
    vocab_size: int
    num_micro_batches: int = 1
    max_in_flight: int = 2
    recompute_lengths: tuple[int, ...] = ()
    min_chunk_tokens: int = 256
    prefix_caching: bool = True
    batching: Batching = "continuous"
    batch_size: int | None = None
    batch_window_s: float = 0.1

    def __post_init__(self) -> None:
        """Refuse limits under which no sequence could ever run."""
        at_least = {
            "max_step_tokens": 1,
            "max_num_seqs": 1,
            "max_model_len": 1,
            "vocab_size": 1,
            "num_micro_batches": 1,
            "max_in_flight": self.num_micro_batches,
            "min_chunk_tokens": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}; raise it")
        self._check_batching()
        assert self.cache.groups, "a layout without a cache group cannot be scheduled"
        for group in self.cache.groups:
            if group.num_blocks < 1:
                raise InputError(
                    "the KV cache has room for no block; give it more memory or lower max_model_len"
                )

    def _check_batching(self) -> None:
        size, window_s = self.batch_size, self.batch_window_s
        if size is not None and not 1 <= size <= self.max_num_seqs:
            raise InputError(
                f"batch_size must be from 1 to max_num_seqs {self.max_num_seqs}, got {size}"
            )
        if not 0 <= window_s < math.inf:
            raise InputError(f"batch_window_s must be a number from 0 up, got {window_s}")
