"""A page in a real browser, and a look at what it does behind the scenes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page


@dataclass
class Watched:
    """A page; ``troubles`` are errors it met and requests to other hosts, ``urls`` all it asked."""

    page: Page
    troubles: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@contextmanager
def watched(url: str, **context: Any) -> Iterator[Watched]:
    """The page of a server, in a browser of its own without a window.

    Within the block an event loop runs on this thread, so no other can.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_context(**context).new_page()
        seen = Watched(page)

        def on_request(asked: Any) -> None:
            seen.urls.append(asked.url)
            if not asked.url.startswith(url):
                seen.troubles.append(asked.url)

        def on_console(said: Any) -> None:
            if said.type in ("error", "warning"):
                seen.troubles.append(said.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: seen.troubles.append(str(error)))
        page.on("request", on_request)
        page.goto(url + "/")
        yield seen
        browser.close()


# Every text that is seen, whose contrast is too small for its size (WCAG 2, AA), and how small.
FAINT_TEXTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own && node.tagName !== "TEXTAREA" && node.tagName !== "INPUT") continue;
    if (!node.checkVisibility() || node.disabled || node.closest("noscript")) continue;
    const style = getComputedStyle(node);
    const [light, dark] = [luminance(numbers(style.color)), luminance(ground(node))]
      .sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), isBold = Number(style.fontWeight) >= 700;
    const needed = size >= 24 || (size >= 18.66 && isBold) ? 3 : 4.5;
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < needed) faint.push(`${ratio.toFixed(2)}: ${node.textContent.slice(0, 40)}`);
  }
  return faint;
}"""

# What a screen reader would stumble over.
STUMBLES = """() => {
  const found = [], ids = new Set();
  const say = (what, node) => found.push(`${what}: ${node.outerHTML.slice(0, 80)}`);
  if (!document.documentElement.lang || !document.title) say("no language or title", document.body);
  if (document.querySelectorAll("h1").length !== 1) say("not one h1", document.body);
  if (document.querySelectorAll("main").length !== 1) say("not one main", document.body);
  for (const node of document.querySelectorAll("[id]")) {
    if (ids.has(node.id)) say("an id twice", node);
    ids.add(node.id);
  }
  for (const node of document.querySelectorAll("[aria-labelledby]")) {
    const named = node.getAttribute("aria-labelledby").split(" ").map((id) =>
      document.getElementById(id));
    if (!named.every((each) => each && each.textContent.trim())) say("no such label", node);
  }
  for (const node of document.querySelectorAll("input, textarea, select")) {
    if (![...node.labels].some((label) => label.textContent.trim())) say("no label", node);
  }
  for (const node of document.querySelectorAll("button, a")) {
    if (!node.textContent.trim()) say("no name", node);
  }
  for (const node of document.querySelectorAll("svg, img")) {
    if (node.getAttribute("aria-hidden") !== "true" && !node.getAttribute("aria-label")) {
      say("a picture without words", node);
    }
  }
  for (const node of document.querySelectorAll("dl > *")) {
    const parts = [...node.children].map((child) => child.tagName).join(" ");
    if (node.tagName !== "DIV" || parts !== "DT DD") say("a broken list", node);
  }
  let level = 0;
  for (const node of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    if (!node.checkVisibility()) continue;
    const own = Number(node.tagName[1]);
    if (own > level + 1) say("a heading's level left out", node);
    level = own;
  }
  return found;
}"""

# Where the keyboard is, and whether that can be seen.
FOCUS = """() => {
  const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
  const isSeen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
    && box.width > 0 && box.left >= 0 && box.bottom > 0 && box.top < innerHeight;
  return [at.id || at.value || at.textContent.trim(), isSeen];
}"""
