"""Everything that is said at the border of the engine process.

A *front* is whoever has requests: an HTTP process, or a program that uses ``AsyncEngine``. Request
ids are a front's own. When a front's channel ends, its requests are aborted, but for those with a
``Resume``: they go on, and whoever asks with the same key follows them from their beginning.
"""

from __future__ import annotations

import msgspec

from spanwise.engine.launch import EnginePlan
from spanwise.engine.sampling_defaults import SamplingDefaults
from spanwise.scheduler.update import SequenceUpdate
from spanwise.types.plan import TaskKind
from spanwise.types.resume import AnswerName, Resume
from spanwise.types.sampling import SamplingSpec
from spanwise.types.serving import EngineHealth, EngineStats
from spanwise.worker.messages import Failed


class AddFront(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To the engine, from its owner: a front has come. Comes with its channel."""


class Admit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Is there room for a request of about so many tokens? Asked before tokenizing.

    Answered by ``Admitted`` or ``Refused``; with ``resume`` also by ``Bound``, or ``RequestFailed``
    for a key that was used before. ``arrived_s``: when it came, on the monotonic clock.
    ``is_further``: it belongs with one that was admitted before.
    """

    request_id: int
    num_tokens: int
    tenant: str
    arrived_s: float
    resume: Resume | None = None
    is_further: bool = False


class CountRefused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """So many more requests the front has refused itself, since a refusal was ``for_all``."""

    num_requests: int


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


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Say all of a request again that this one was bound to, and then what comes."""

    request_id: int


class EndChoice(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The text has ended a choice, with its first ``num_tokens`` tokens.

    ``stop_reason`` is the stop string that was met, if it was one.
    """

    request_id: int
    choice: int
    stop_reason: str | None
    num_tokens: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The front wants no more of a request; nothing happens where it has ended.

    One that other fronts follow too goes on for them.
    """

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


class Bound(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The request was asked for before. What came of it waits for ``Attach``."""

    request_id: int
    name: AnswerName
    prompt_token_ids: tuple[int, ...]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is no room; ``for_all``: for no request whatever, at this moment."""

    request_id: int
    message: str
    retry_after_s: float
    tenant: bool
    for_all: bool = False


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The request is queued."""

    request_id: int


class RequestFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The request has ended without a result."""

    request_id: int
    error: Failed


class ChoiceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What a step brought to one choice, and when (Unix time)."""

    request_id: int
    choice: int
    update: SequenceUpdate
    at: int


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


FromFront = Admit | CountRefused | Submit | Attach | EndChoice | Abort | AskHealth | AskStats
ToFront = (
    Phase
    | Located
    | Running
    | Admitted
    | Bound
    | Refused
    | Accepted
    | RequestFailed
    | News
    | Health
    | Stats
    | EngineFailed
)
