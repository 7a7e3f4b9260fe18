"""What readers do with a page in the browser, and what they see."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from browser import Page, find_chromium, opened

__all__ = ["box_of", "click", "count", "some_browser", "tab_to", "text"]


def some_browser() -> Iterator[Page]:
    """A browser for the tests of a file; they are skipped where there is none."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a real browser")
    with opened(chromium) as shown:
        yield shown


def count(shown: Page, selector: str) -> int:
    return shown.value(f"document.querySelectorAll({json.dumps(selector)}).length")


def text(shown: Page, selector: str) -> str:
    return shown.value(f"document.querySelector({json.dumps(selector)}).textContent")


def click(shown: Page, selector: str) -> None:
    shown.value(f"document.querySelector({json.dumps(selector)}).click()")
    shown.settle()


def tab_to(shown: Page, selector: str) -> None:
    """Walk there with the Tab key alone."""
    for _ in range(60):
        shown.press("Tab", 9)
        if shown.value(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"the Tab key never reaches {selector}")


def box_of(shown: Page, selector: str) -> tuple[float, float, float, float]:
    """Left, top, width and height in the window, after scrolling there."""
    name = json.dumps(selector)
    shown.value(f"document.querySelector({name}).scrollIntoView({{ block: 'center' }})")
    shown.settle()
    rectangle = f"document.querySelector({name}).getBoundingClientRect()"
    x, y, width, height = shown.value(f"(b => [b.x, b.y, b.width, b.height])({rectangle})")
    return x, y, width, height
