from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from tests.server.bad_input.case import CONTEXT, KEYS
from tests.support.server import RealServer, serving


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server would keep files, if it did."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="package")
def server(folder: Path) -> Iterator[RealServer]:
    """One for all: with keys, a short context, and a log of every request."""
    keys = [word for key in KEYS for word in ("--api-key", key)]
    options = ("--max-model-len", str(CONTEXT), "--access-log")
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(folder))
    with serving(*keys, *options, **places) as server:
        with server.client(KEYS[0]) as client:
            body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": "a"}}
            server.complete(body, key=KEYS[0]).raise_for_status()  # what starts with first use
            client.get("/metrics").raise_for_status()
        yield server


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[httpx2.Client]:
    """One without a key."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def ours(server: RealServer) -> Iterator[httpx2.Client]:
    """One with a key."""
    with server.client(KEYS[0]) as client:
        yield client
