"""The page in a real browser: drawn, used by keyboard, quiet, and alone with its server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.server.fakes import FakeEngine
from tests.server.running import Running, running

from spanwise.engine.launch import DeviceUse, EnginePlan
from spanwise.server.options import ServerOptions, digest
from spanwise.types.worker import RankPlace

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

_KEY = "secret"


class LaidOut(FakeEngine):
    """Two replicas of two stages of two ranks."""

    @property
    def plan(self) -> EnginePlan:
        places = [RankPlace(dp=i // 4, pp=i // 2 % 2, tp=i % 2) for i in range(8)]
        uses = [
            DeviceUse(place=p, device=f"cpu:{i}", weight_bytes=30 << 20, cache_bytes=64 << 20)
            for i, p in enumerate(places)
        ]
        return msgspec.structs.replace(super().plan, layout="dp=2 x pp=2 x tp=2", ranks=tuple(uses))


@contextmanager
def opened(server: Running, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what went wrong with it."""
    from playwright.sync_api import sync_playwright

    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_context(**context).new_page()
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else 0)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(server.url) else troubles.append(asked.url),
        )
        page.goto(server.url + "/")
        yield page, troubles
        browser.close()


@pytest.fixture(autouse=True)
def laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.running.FakeEngine", LaidOut)


def test_layout_is_drawn_and_nothing_else_is_asked() -> None:
    with running() as server, opened(server) as (page, troubles):
        page.get_by_text("● Running").wait_for()
        assert page.get_by_role("heading", name=re.compile("^Replica")).count() == 2
        assert page.locator(".ranks > li").count() == 8
        assert "5 of 20 (25%)" in page.locator("#replicas").inner_text()
        assert not troubles


def test_prompt_is_streamed_by_keyboard() -> None:
    with running() as server, opened(server) as (page, troubles):
        server.on_loop(lambda: setattr(server.engine, "script", lambda _: "<b>fine</b> & well"))
        page.get_by_text("● Running").wait_for()
        page.get_by_role("textbox", name="Prompt").focus()
        for _ in range(3):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_text("Finished (stop)").wait_for()
        answer = page.get_by_role("region", name="Answer")
        assert answer.inner_text() == "<b>fine</b> & well"
        assert answer.get_attribute("aria-busy") == "false"
        assert not troubles


def test_stop_ends_the_request() -> None:
    with running() as server, opened(server) as (page, _):
        server.on_loop(lambda: setattr(server.engine, "holding", True))
        page.get_by_text("● Running").wait_for()
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped").wait_for()


def test_key_is_asked_for() -> None:
    options = ServerOptions(api_key_digests=(digest(_KEY),))
    with running(options) as server, opened(server) as (page, _):
        page.get_by_label("Key", exact=True).fill(_KEY)
        page.keyboard.press("Enter")
        page.get_by_text("● Running").wait_for()
        assert page.locator(".ranks > li").count() == 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_screen(scheme: str) -> None:
    size = {"width": 360, "height": 740}
    with running() as server, opened(server, viewport=size, color_scheme=scheme) as (page, _):
        page.locator(".ranks > li").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
