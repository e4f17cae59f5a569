"""The program's way in and out: signals, one line for an error, the exit code.

Imports little, so that Ctrl-C is taken care of from the first moment.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from spanwise.cli.stopping import end_on_signals
from spanwise.errors import InputError, SpanwiseError

WRONG_INPUT = 2
FAILED = 1
BROKEN_PIPE = 128 + signal.SIGPIPE


def main() -> NoReturn:
    """Run the command line and end the process.

    Exit codes: 0; 1 what failed here; 2 wrong input; 128 + n for signal n.
    """
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what a terminal cannot show
    _leave(_run(sys.argv[1:]))


def _run(arguments: Sequence[str]) -> int:
    from cyclopts import CycloptsError

    from spanwise.cli.app import app

    try:
        app(arguments)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        return BROKEN_PIPE
    except CycloptsError as error:
        return _refuse(error, f"{' '.join(str(error).split()).rstrip('.')}; see spanwise --help")
    except SpanwiseError as error:
        _refuse(error, " ".join(str(error).split()))
        return WRONG_INPUT if isinstance(error, InputError) else FAILED
    except OSError as error:  # a full disk, say
        where = f": {error.filename}" if error.filename else ""
        _refuse(error, f"{error.strerror or error}{where}")
        return FAILED
    return 0


def _refuse(error: Exception, line: str) -> int:
    if os.environ.get("SPANWISE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if logging.root.handlers:  # the command writes log lines; so is its last one
        logging.getLogger("spanwise").error("%s", line)
    else:
        print(f"spanwise: {line}", file=sys.stderr)
    return WRONG_INPUT


def _leave(code: int) -> NoReturn:
    """End now: a thread may still import torch, and taking torch down takes time."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = BROKEN_PIPE
    os._exit(code)
