"""Errors across the process border: the kind and its one line survive, the traceback stays."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spanwise import errors
from spanwise.errors import InputError, SpanwiseError, WaitInterruptedError, WorkerError, reason
from spanwise.worker.channel import Channel, ChannelClosed
from spanwise.worker.messages import Failed

_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SpanwiseError)
}


def failure_of(error: BaseException, where: str) -> Failed:
    """What to report of an error; one about the caller's input speaks for itself."""
    if isinstance(error, InputError):
        return Failed(_kind_of(error), reason(error))
    kind = _kind_of(error) if isinstance(error, SpanwiseError) else WorkerError.__name__
    return Failed(kind, f"{where} failed: {reason(error, expected=False)}")


def error_of(failed: Failed) -> SpanwiseError:
    """The error to raise for a reported failure."""
    return _KINDS.get(failed.kind, WorkerError)(failed.message)


@contextmanager
def reported(channel: Channel[Any], where: Callable[[], str]) -> Iterator[None]:
    """Tell the other side why this process ends; ``where`` names it ("worker ... in step 3")."""
    try:
        yield
    except ChannelClosed:
        raise
    except BaseException as error:
        if os.environ.get("SPANWISE_DEBUG") and not isinstance(error, WaitInterruptedError):
            traceback.print_exc()
        channel.send(failure_of(error, where()))
        raise


def _kind_of(error: SpanwiseError) -> str:
    """The nearest class that has a name on the other side."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
