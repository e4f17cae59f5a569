"""The one exception tree.

A message is one line: what was wrong, what was expected, how to mend it.
"""


class SpanwiseError(Exception):
    """Root of everything Spanwise raises on purpose."""


class InputError(SpanwiseError):
    """What the caller gave cannot be used: a value, a file, a prompt."""


class ModelError(InputError):
    """The model folder is missing, damaged, or holds a model that is not supported."""


class LayoutError(InputError):
    """The wanted layout cannot be, for this model or for these devices."""


class DeviceError(InputError):
    """A device that was asked for is not there, or has too little memory."""


class PlanError(ModelError):
    """A model's own parallel plan says something this version does not know."""


class EngineError(SpanwiseError):
    """The engine itself failed: a worker died, a step could not run."""


class WorkerError(EngineError):
    """A worker process failed; the message names the rank, the step and the cause."""


class CommunicationError(EngineError):
    """A collective or hand-over could not finish."""


class WaitInterruptedError(CommunicationError):
    """A blocking wait was broken on purpose, by an epoch change or by shutdown."""


def reason(error: BaseException) -> str:
    """What a foreign error says, in one short line that starts with its kind where that helps."""
    said = " ".join(str(error).split())[:200]
    if said and isinstance(error, ValueError | OSError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
