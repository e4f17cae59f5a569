"""What the journal is made of: one entry for each thing that must survive the engine."""

from __future__ import annotations

import msgspec

from spanwise.types.outputs import FinishReason
from spanwise.types.plan import TaskKind, TokenLogprobs
from spanwise.types.resume import Resume
from spanwise.types.sampling import SamplingSpec


class ChoiceRecord(msgspec.Struct, frozen=True, array_like=True):
    """One choice: its sequence, what it has so far, and what of it was sent.

    ``logprobs`` are those of the tokens not sent yet, where logprobs were asked for.
    """

    sequence_id: int
    sampling: SamplingSpec
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_chars_sent: int = 0
    num_tokens_sent: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Admitted(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag=1):
    """A request that was promised an answer, as it stands: fresh, or after a part of its life.

    ``choices`` carry their seeds resolved. ``deadline_s`` is a time on the engine's clock, one
    that goes on while no engine runs. ``resume``: by what it may be asked for again.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    choices: tuple[ChoiceRecord, ...]
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    task: TaskKind = "generate"
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    resume: Resume | None = None


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A choice has ended, with its first ``num_tokens`` tokens; None for all that were accepted.

    Fewer, and another reason than was known before, where the text shows that a stop string came
    first: the last entry holds. A pooled prompt is never finished, only forgotten: its vector is
    not kept, so until it was sent it is computed again.
    """

    sequence_id: int
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    num_tokens: int | None = None


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """What a step brought: token i belongs to sequence i, which may be named more than once.

    ``finished`` are the choices these tokens ended, in the same entry, since a sequence that has
    all its tokens cannot be resumed. ``logprobs`` is empty, or as long as the tokens.
    """

    sequence_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finished: tuple[Finished, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How much of a choice has been sent in all."""

    sequence_id: int
    num_chars: int
    num_tokens: int


class Sent(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Text and tokens that have left."""

    progress: tuple[Progress, ...]


class Forgotten(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A request that needs nothing more: all of it was sent, or nobody waits for it."""

    request_id: int


Entry = Admitted | Accepted | Sent | Finished | Forgotten
