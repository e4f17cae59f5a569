"""The page's files and what it asks: served, fenced in, and guarded like everything else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.server.fakes import MODEL, FakeEngine

from spanwise.server.app import create_app
from spanwise.server.options import ServerOptions, digest
from spanwise.server.page.files import PAGE_PATHS
from spanwise.types.serving import EngineHealth, EngineStats

_KEY = "secret"
_URL = "http://127.0.0.1"


def client(engine: FakeEngine, **options: Any) -> TestClient:
    return TestClient(create_app(engine, ServerOptions(**options)), base_url=_URL)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def guarded(engine: FakeEngine) -> Iterator[TestClient]:
    yield client(engine, api_key_digests=(digest(_KEY),))


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_files_come_without_a_key_and_fenced_in(guarded: TestClient, path: str) -> None:
    answer = guarded.get(path)
    assert answer.status_code == 200 and answer.content
    rules = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_names_only_files_of_its_own(engine: FakeEngine) -> None:
    page = client(engine).get("/").text
    assert {f"/{name}" for name in re.findall(r'(?:src|href)="([^"#]+)"', page)} < PAGE_PATHS
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)
    assert "://" not in page


def test_every_control_has_a_label(engine: FakeEngine) -> None:
    page = client(engine).get("/").text
    labelled = set(re.findall(r'<label for="([^"]+)"', page))
    for label in re.findall(r"<label>.*?</label>", page):
        labelled |= set(re.findall(r'\bid="([^"]+)"', label))
    assert set(re.findall(r'<(?:input|textarea) id="([^"]+)"', page)) == labelled


def test_status_is_guarded(guarded: TestClient) -> None:
    assert guarded.get("/status").status_code == 401
    given = guarded.get("/status", headers={"authorization": f"Bearer {_KEY}"})
    assert given.status_code == 200


def test_status_says_plan_health_and_counts(engine: FakeEngine) -> None:
    status = client(engine).get("/status").json()
    assert status["ready"] and status["healthy"] and status["phase"] == "ready"
    assert status["model"] == status["plan"]["model"] == MODEL
    assert status["ranks"] == [
        {"name": "rank 0", "device": "cpu:0", "age_s": 0.01, "healthy": True}
    ]
    assert status["stats"]["replicas"][0]["num_waiting"] == 3
    times = status["stats"]["replicas"][0]["histograms"]
    assert times["time_to_first_token_seconds"] == [[0.01, 0.1], [3, 2, 1], 0.5]
    assert status["stats"]["devices"][0]["utilization"] == 0.75


def test_status_goes_forward(engine: FakeEngine) -> None:
    asked = client(engine)
    first, second = (asked.get("/status").json()["at_s"] for _ in range(2))
    assert first < second


def test_status_says_how_far_the_start_has_come(engine: FakeEngine) -> None:
    engine.is_ready, engine.phase = False, "loading weights"
    status = client(engine).get("/status").json()
    assert not status["ready"] and status["phase"] == "loading weights"
    assert status["plan"] is None and status["stats"] is None


def test_status_does_not_tell_why_the_start_failed(engine: FakeEngine) -> None:
    engine.is_ready, engine.phase = False, "failed: /srv/somebody/model has no config"
    assert "somebody" not in client(engine).get("/status").text


def test_status_says_that_a_rank_is_silent(engine: FakeEngine) -> None:
    engine.is_healthy = False
    status = client(engine).get("/status").json()
    assert not status["healthy"] and not status["ranks"][0]["healthy"]


def test_an_engine_that_does_not_answer_is_not_well() -> None:
    class Stuck(FakeEngine):
        async def stats(self) -> EngineStats:
            await asyncio.Event().wait()
            raise AssertionError

        async def health(self) -> EngineHealth:
            return EngineHealth(True)

    status = client(Stuck(), health_timeout_s=0.05).get("/status").json()
    assert status["ready"] and not status["healthy"] and status["stats"] is None
