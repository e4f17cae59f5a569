"""Everything that is said at the border of the engine process.

A *front* is whoever has requests: an HTTP process, or a program that uses ``AsyncEngine``. Request
ids are a front's own. When a front's channel ends, its requests are aborted.
"""

from __future__ import annotations

import msgspec

from spanwise.engine.launch import EnginePlan
from spanwise.engine.sampling_defaults import SamplingDefaults
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TaskKind
from spanwise.types.sampling import SamplingSpec
from spanwise.types.serving import EngineHealth, EngineStats
from spanwise.worker.messages import Failed


class AddFront(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To the engine, from its owner: a front has come. Comes with its channel."""


class Admit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Is there room for a request of about so many tokens? Asked before tokenizing.

    Answered by ``Admitted`` or ``Refused``. ``arrived_s``: when it came, on the monotonic clock.
    """

    request_id: int
    num_tokens: int
    tenant: str
    arrived_s: float


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run an admitted request. Answered by ``Accepted``, or ``RequestFailed``."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    choices: tuple[SamplingSpec, ...]
    max_tokens: int | None
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    task: TaskKind = "generate"
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""


class EndChoice(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A stop string has ended a choice, with its first ``num_tokens`` tokens."""

    request_id: int
    choice: int
    stop_reason: str
    num_tokens: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The front wants no more of a request; nothing happens where it has ended."""

    request_id: int


class AskHealth(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by ``Health``, in the order of asking."""


class AskStats(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered by ``Stats``, in the order of asking."""


class Phase(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How far the start has come."""

    text: str


class Located(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model's folder is there: its tokenizer can be loaded, beside the weights."""

    folder: str


class Running(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine takes requests."""

    plan: EnginePlan
    vocab_size: int
    defaults: SamplingDefaults


class Admitted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is room; it is held until the request ends or is aborted."""

    request_id: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is no room."""

    request_id: int
    message: str
    retry_after_s: float
    tenant: bool


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The request is queued."""

    request_id: int


class RequestFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The request has ended without a result."""

    request_id: int
    error: Failed


class ChoiceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What a step brought to one choice."""

    request_id: int
    choice: int
    update: SequenceUpdate


class News(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What steps brought to a front's requests."""

    updates: tuple[ChoiceUpdate, ...]


class Health(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to ``AskHealth``."""

    health: EngineHealth


class Stats(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to ``AskStats``."""

    stats: EngineStats


class EngineFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine ends; every request of the front has failed."""

    error: Failed


FromFront = Admit | Submit | EndChoice | Abort | AskHealth | AskStats
ToFront = (
    Phase
    | Located
    | Running
    | Admitted
    | Refused
    | Accepted
    | RequestFailed
    | News
    | Health
    | Stats
    | EngineFailed
)
