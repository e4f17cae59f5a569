"""The page over the real server: what is drawn is what happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from tests.server.browser import watched
from tests.support.server import DENSE, PATIENCE_S, RealServer, serving, until

pytestmark = pytest.mark.browser

_KEY = "spoken-by-nobody"

# Notes how long the answer is each time it grows.
_WATCH_ANSWER = """() => {
  const answer = document.getElementById("answer");
  window.lengths = [];
  new MutationObserver(() => window.lengths.push(answer.textContent.length))
    .observe(answer, { childList: true });
}"""
# Whether both devices show a load, and lines have been drawn of what is passed on.
_IS_MOVING = """() => {
  const loads = [...document.querySelectorAll("rect.load")];
  const lines = [...document.querySelectorAll(".chart path:first-child")];
  return loads.length === 2 && loads.every((load) => Number(load.getAttribute("width")) > 0)
    && lines.every((line) => /M.*L/.test(line.getAttribute("d")));
}"""
_LINES = """() => [...document.querySelectorAll(".chart path:first-child")]
  .map((line) => line.getAttribute("d"))"""
_HAVE_MOVED = f"(before) => ({_LINES})().every((line, i) => line !== before[i])"


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    arguments = ("-tp", "2", "--devices", "cpu:2", "--access-log", "--log-format", "json")
    with serving(*arguments, SPANWISE_API_KEY=_KEY) as server:
        yield server


@contextmanager
def answering(server: RealServer, num_requests: int) -> Iterator[None]:
    """While so many long answers are given; they are left at the end."""
    body = {"model": DENSE, "prompt": "class A", "max_tokens": 1500, "ignore_eos": True}
    with ExitStack() as open_streams:
        for _ in range(num_requests):
            client = open_streams.enter_context(server.client(_KEY))
            stream = client.stream("POST", "/v1/completions", json=body | {"stream": True})
            assert open_streams.enter_context(stream).status_code == 200
        yield


def test_the_page_shows_a_prompt_and_others_load(server: RealServer) -> None:
    with watched(server.url) as seen:
        page = seen.page
        page.set_default_timeout(PATIENCE_S * 1e3)
        page.get_by_label("Key", exact=True).fill(_KEY)
        page.keyboard.press("Enter")
        page.get_by_text("● Running").wait_for()
        assert page.locator(".ranks > li").count() == 2
        assert page.get_by_text("✓ answers").count() == 2
        seen.troubles.clear()  # that a key was asked for is one for the console

        page.evaluate(_WATCH_ANSWER)
        page.get_by_role("radio", name="Completion").check()
        page.get_by_role("textbox", name="Prompt").fill("def main(")
        page.get_by_role("spinbutton", name="Max tokens").fill("40")
        page.get_by_role("button", name="Send").press("Enter")
        page.get_by_text("Finished (").wait_for()
        lengths = page.evaluate("lengths")
        assert len(set(lengths)) > 5 and lengths == sorted(lengths)
        assert page.locator("#answer").inner_text().strip()

        with answering(server, 2):
            page.get_by_text("2 running, 0 waiting").wait_for()
            page.wait_for_function(_IS_MOVING)
            before = page.evaluate(_LINES)
            page.wait_for_function(_HAVE_MOVED, arg=before)
        page.get_by_text("0 running, 0 waiting").wait_for()

        assert not seen.troubles
        assert not any(_KEY in url for url in [*seen.urls, page.url])
    assert_metrics_of_devices(server)
    assert_all_is_logged(server)


def assert_metrics_of_devices(server: RealServer) -> None:
    metrics = server.metrics(key=_KEY)
    assert metrics["device_busy_seconds_total"] > 0.0
    assert 0 < metrics["device_weight_bytes"] < metrics["device_memory_used_bytes"]
    assert metrics["device_memory_used_bytes"] < metrics["device_memory_total_bytes"]


def assert_all_is_logged(server: RealServer) -> None:
    """The page's prompt and what was left, in lines of JSON without the key or the prompt."""

    def asked_for() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in list(server.said)]
        return [line for line in lines if line.get("path") == "/v1/completions"]

    assert until(lambda: len(asked_for()) == 3), server.said
    assert all(_KEY not in line and "def main(" not in line for line in server.said)
    asked = asked_for()
    assert sorted(line.get("aborted", False) for line in asked) == [False, True, True]
    (own,) = (line for line in asked if "aborted" not in line)
    assert own["finish_reason"] in ("length", "stop") and 0 < own["output_tokens"] <= 40
    assert 0 < own["ttft_ms"] < own["duration_ms"]
