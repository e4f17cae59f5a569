"""The page in a real browser: drawn, used by keyboard, readable, and alone with its server."""

from __future__ import annotations

import re

import msgspec
import pytest
from tests.server.browser import FAINT_TEXTS, FOCUS, STUMBLES, watched
from tests.server.fakes import FakeEngine
from tests.server.running import running

from spanwise.engine.launch import DeviceUse, EnginePlan
from spanwise.server.options import ServerOptions, digest
from spanwise.types.serving import DeviceStats, EngineStats
from spanwise.types.worker import RankPlace

pytestmark = pytest.mark.browser

_KEY = "secret"
_PLACES = [RankPlace(dp=i // 4, pp=i // 2 % 2, tp=i % 2) for i in range(8)]


class LaidOut(FakeEngine):
    """Two replicas of two stages of two ranks, the first of which work more than the others."""

    @property
    def plan(self) -> EnginePlan:
        uses = [
            DeviceUse(place=p, device=f"cpu:{i}", weight_bytes=30 << 20, cache_bytes=64 << 20)
            for i, p in enumerate(_PLACES)
        ]
        return msgspec.structs.replace(super().plan, layout="dp=2 x pp=2 x tp=2", ranks=tuple(uses))

    async def stats(self) -> EngineStats:
        devices = tuple(
            DeviceStats(
                device=f"cpu:{i}",
                replica=place.dp,
                stage=place.pp,
                rank=place.tp,
                utilization=(7 - i) / 10,
                busy_s=1.0,
                memory_used_bytes=(200 + i) << 20,
                memory_total_bytes=16 << 30,
                weight_bytes=30 << 20,
                cache_bytes=64 << 20,
            )
            for i, place in enumerate(_PLACES)
        )
        return msgspec.structs.replace(await super().stats(), devices=devices)


@pytest.fixture(autouse=True)
def laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.running.FakeEngine", LaidOut)


def test_layout_is_drawn_and_nothing_else_is_asked() -> None:
    with running() as server, watched(server.url) as seen:
        page = seen.page
        page.get_by_text("● Running").wait_for()
        assert page.get_by_role("heading", name=re.compile("^Replica")).count() == 2
        assert page.get_by_role("heading", name=re.compile("Stage")).count() == 4
        assert "5 of 20 (25%)" in page.locator("#replicas").inner_text()
        devices = page.locator(".ranks > li")
        assert devices.count() == 8
        for i in range(8):
            said = devices.nth(i).inner_text()
            assert f"cpu:{i}" in said and f"{200 + i} MiB of 16.0 GiB" in said
            assert re.search(rf"Load\s+{10 * (7 - i)}%", said)
            width = devices.nth(i).locator("rect.load").get_attribute("width")
            assert width is not None and float(width) == 10 * (7 - i)
        assert not seen.troubles


def test_prompt_is_streamed_by_keyboard() -> None:
    with running() as server, watched(server.url) as seen:
        page = seen.page
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
        assert not seen.troubles


def test_the_keyboard_reaches_everything_and_shows_where_it_is() -> None:
    with running() as server, watched(server.url) as seen:
        page = seen.page
        page.get_by_text("● Running").wait_for()
        passed = []
        for _ in range(7):
            page.keyboard.press("Tab")
            passed.append(page.evaluate(FOCUS))
        names = (
            "Go to the prompt",
            "chat",
            "prompt",
            "temperature",
            "max-tokens",
            "send",
            "answer",
        )
        assert passed == [[name, True] for name in names]
        page.get_by_role("link", name="Go to the prompt").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name="Completion").is_checked()


def test_stop_ends_the_request() -> None:
    with running() as server, watched(server.url) as seen:
        page = seen.page
        server.on_loop(lambda: setattr(server.engine, "holding", True))
        page.get_by_text("● Running").wait_for()
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped").wait_for()


def test_key_is_asked_for_and_kept_out_of_sight() -> None:
    options = ServerOptions(api_key_digests=(digest(_KEY),))
    with running(options) as server, watched(server.url) as seen:
        page = seen.page
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The key is not accepted").wait_for()
        page.get_by_label("Key", exact=True).fill(_KEY)
        page.keyboard.press("Enter")
        page.get_by_text("● Running").wait_for()
        assert page.locator(".ranks > li").count() == 8
        assert page.locator("#key").input_value() == ""
        assert not any(_KEY in url for url in [*seen.urls, page.url])
        assert _KEY not in page.content()
        assert page.evaluate("localStorage.length") == 0 and page.evaluate("document.cookie") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_is_named(scheme: str) -> None:
    with running() as server, watched(server.url, color_scheme=scheme) as seen:
        seen.page.locator(".ranks > li").first.wait_for()
        seen.page.get_by_text("p50 ").first.wait_for()
        assert seen.page.evaluate(FAINT_TEXTS) == []
        assert seen.page.evaluate(STUMBLES) == []


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_is_wider_than_the_screen(width: int) -> None:
    size = {"width": width, "height": 740}
    with running() as server, watched(server.url, viewport=size) as seen:
        seen.page.locator(".ranks > li").first.wait_for()
        seen.page.get_by_text("p50 ").first.wait_for()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
