"""Libraries that only some jobs need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from spanwise.errors import InputError


def optional_module(name: str, what: str) -> Any:
    """Import a module that ``what`` needs. Raises InputError with the line that installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise InputError(
            f'{what} need {library}, which is not installed: pip install "spanwise[batch]"'
        ) from error
