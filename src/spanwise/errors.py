"""The one exception tree.

A message is one line: what was wrong, what was expected, how to mend it.
"""


class SpanwiseError(Exception):
    """Root of everything Spanwise raises on purpose."""


class InputError(SpanwiseError):
    """What the caller gave cannot be used: a value, a file, a prompt."""


class ContextLengthError(InputError):
    """The prompt leaves no room for an answer in the model's context."""


class KeyReusedError(InputError):
    """An idempotency key came again with another request than the first time."""


class ModelError(InputError):
    """The model folder is missing, damaged, or holds a model that is not supported."""


class LayoutError(InputError):
    """The wanted layout cannot be, for this model or for these devices."""


class DeviceError(InputError):
    """A device that was asked for is not there, or has too little memory."""


class PlanError(ModelError):
    """A model's own parallel plan says something this version does not know."""


class OverloadedError(SpanwiseError):
    """There is no room for the request now; ``retry_after_s`` says when there may be.

    ``of_tenant``: it is the tenant that has enough, others are taken.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0, of_tenant: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.of_tenant = of_tenant


class ItemError(InputError):
    """The model could not compute an item."""


class DeadlineError(SpanwiseError):
    """A request's time was up before it was computed."""


class SupersededError(SpanwiseError):
    """A newer item of the same stream came before this one was computed."""


class EngineError(SpanwiseError):
    """The engine itself failed: a worker died, a step could not run."""


class WorkerError(EngineError):
    """A worker process failed; the message names the rank, the step and the cause."""


class CommunicationError(EngineError):
    """A collective or hand-over could not finish."""


class WaitInterruptedError(CommunicationError):
    """A blocking wait was broken on purpose, by an epoch change or by shutdown."""


# Foreign code raises these with a sentence; others hold a key, a name, or nothing.
_SENTENCES = (ValueError, OSError, RuntimeError, AssertionError)
_MAX_LENGTH = 200


def reason(error: BaseException, *, expected: bool = True) -> str:
    """What an error says, in one line: one of ours in full, a foreign one shortened.

    A foreign one is led by its kind where that helps: always where it was not ``expected``.
    """
    if isinstance(error, SpanwiseError):
        return " ".join(str(error).split())
    said = _first_line(str(error))[:_MAX_LENGTH]
    if said and expected and isinstance(error, _SENTENCES):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _first_line(text: str) -> str:
    """The first line, for below it stand hints and frames; all where it only announces them."""
    first, _, rest = text.strip().partition("\n")
    announces = first.rstrip().endswith(":")
    return " ".join((first + " " + rest if announces else first).split())
