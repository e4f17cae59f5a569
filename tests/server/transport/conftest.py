from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from tests.server.transport.wire import QUICK, Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log", QUICK) as running:
        yield running


@pytest.fixture
def num_sockets(pytestconfig: pytest.Config) -> int:
    return 1000 if pytestconfig.getoption("--full") else 300


@pytest.fixture(autouse=True, scope="module")
def enough_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
