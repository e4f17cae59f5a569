"""Fixtures of the tests that start engines; a conftest imports those it offers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spanwise.worker.supervisor import Supervisor


@pytest.fixture(scope="session")
def supervisor() -> Iterator[Supervisor]:
    """One fork server for all engines of the run: each starts at once."""
    shared = Supervisor()
    yield shared
    shared.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are written, once a run."""
    return tmp_path_factory.mktemp("models")
