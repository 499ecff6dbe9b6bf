"""The report of a study in a browser: everything is seen and can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qat.report.page import write_report
from tests.report.test_page import CASES, NAMES

pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# Contrast of every text with the ground it stands on, by the formula of WCAG 2.
CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number)
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor)
      if (found.length === 3 || found[3] === 1) return found
    }
    throw new Error('no ground')
  }
  const seen = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement
    if (!walk.currentNode.textContent.trim() || element.tagName === 'style') continue
    const style = getComputedStyle(element)
    const isDrawn = element instanceof SVGElement
    const text = luminance(channels(isDrawn ? style.fill : style.color))
    const [low, high] = [text, luminance(ground(element))].sort((a, b) => a - b)
    seen.push([(high + 0.05) / (low + 0.05), isDrawn, walk.currentNode.textContent.trim()])
  }
  return seen
}"""
BOXES = """() => [...document.querySelectorAll('figure')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect()
  return [figure.id.replace('figure-', ''), box.width, box.height, figure.checkVisibility()]
})"""
# Text of a picture that is cut off by its edge or written over other text.
CLASHES = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const edge = svg.getBoundingClientRect()
  const texts = [...svg.querySelectorAll('text')]
    .map(t => [t.textContent, t.getBoundingClientRect()])
  const cut = texts.filter(([, b]) => b.left < edge.left - 1 || b.right > edge.right + 1 ||
    b.top < edge.top - 1 || b.bottom > edge.bottom + 1).map(([t]) => 'cut: ' + t)
  const over = texts.flatMap(([t, a], i) => texts.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4).map(([u]) => t + ' over ' + u))
  return [...cut, ...over]
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH: the page is not looked at in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


def open_page(browser: Any, path: Path, **how: Any) -> tuple[Any, list[str]]:
    opened, said = browser.new_page(**how), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url))
    opened.goto(path.as_uri())
    assert said.pop(0) == path.as_uri()
    return opened, said


@pytest.mark.parametrize("case", ["plain", "evil", "8 treatments"])
def test_all_is_seen_and_read(browser: Any, tmp_path: Path, case: str) -> None:
    write_report(CASES[case](), tmp_path)
    for width in (360, 1280):
        for scheme in ("light", "dark"):
            size = {"width": width, "height": 800}
            opened, said = open_page(
                browser, tmp_path / "report.html", viewport=size, color_scheme=scheme
            )
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            boxes = opened.evaluate(BOXES)
            assert {name for name, *_ in boxes} == NAMES
            assert all(w > 300 and h > 100 and visible for _, w, h, visible in boxes)
            contrasts = opened.evaluate(CONTRASTS)
            assert sum(is_drawn for _, is_drawn, _ in contrasts) > 40
            assert [found for found in contrasts if found[0] < 4.5] == []
            ground = opened.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
            assert opened.evaluate(CLASHES) == []
            assert said == []
            opened.close()


def test_print_is_light_and_whole(browser: Any, tmp_path: Path) -> None:
    write_report(CASES["200 rows"](), tmp_path)
    # A4 across less its margins, in CSS pixels.
    size = {"width": 1039, "height": 711}
    opened, said = open_page(browser, tmp_path / "report.html", viewport=size, color_scheme="dark")
    opened.emulate_media(media="print")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 1039
    assert [found for found in opened.evaluate(CONTRASTS) if found[0] < 4.5] == []
    ground = opened.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    hidden = "e => e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1"
    assert not opened.evaluate(f"[...document.querySelectorAll('.scroll')].some({hidden})")
    assert all(visible and w > 300 for _, w, _, visible in opened.evaluate(BOXES))
    assert said == []
    opened.close()
