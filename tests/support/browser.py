"""Reports in the Chromium of this machine, driven by Playwright: one browser per test process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["NO_CHROMIUM", "PHONE", "Windows", "tab_to", "wait_until"]

NO_CHROMIUM = "no Chromium on this machine: pages are not tried in a real browser"
PHONE = 500
"""Windows narrower than this are those of a phone: with a touch screen, scaled as phones do."""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for found in map(shutil.which, names) if found), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip(NO_CHROMIUM)
    from playwright.sync_api import sync_playwright  # takes half a second: not for other tests

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as one:
        yield one


@dataclass
class Windows:
    """Opens reports, each in a window of its own with an empty profile.

    Attributes:
        complaints: every message on the console and every uncaught exception.
        requests: addresses of everything that was asked for, the reports themselves included.
    """

    browser: Browser
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)

    def __call__(
        self, report: Path, width: int = 1280, *, dark: bool = False, scripts: bool = True
    ) -> Page:
        phone = width < PHONE
        page = self.browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
            is_mobile=phone,
            has_touch=phone,
        )
        self.pages.append(page)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(report.resolve().as_uri())
        return page

    def require_quiet(self) -> None:
        """Whatever a test does with a report: it complains of nothing and loads nothing."""
        outside = [one for one in self.requests if not one.startswith(("file:", "data:"))]
        assert (self.complaints, outside) == ([], [])

    def close(self) -> None:
        for page in self.pages:
            page.context.close()


@pytest.fixture
def windows(chromium: Browser) -> Iterator[Windows]:
    opened = Windows(chromium)
    yield opened
    opened.close()
    opened.require_quiet()


@pytest.fixture(scope="module")
def desktop(chromium: Browser) -> Iterator[Windows]:
    """One window for all tests of a file."""
    opened = Windows(chromium)
    yield opened
    opened.close()


@pytest.fixture
def page(desktop: Windows, report: Path) -> Iterator[Page]:
    """The report of the test's file, loaded anew on a desktop."""
    if not desktop.pages:
        desktop(report)
    else:
        desktop.pages[0].set_viewport_size({"width": 1280, "height": 900})
        desktop.pages[0].emulate_media(color_scheme="light")
        desktop.pages[0].goto(report.resolve().as_uri())
    yield desktop.pages[0]
    desktop.require_quiet()


def wait_until(page: Page, expression: str, arg: object = None) -> None:
    """Until a JavaScript expression is true.

    Not `page.wait_for_function`: that evaluates a text within the page, which the reports forbid.
    """
    ends = time.monotonic() + 20
    while not page.evaluate(expression, arg):
        assert time.monotonic() < ends, f"not true within 20 seconds: {expression}"
        page.wait_for_timeout(50)


def tab_to(page: Page, selector: str) -> None:
    """Walk there with the Tab key alone."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("name => document.activeElement.matches(name)", selector):
            return
    raise AssertionError(f"the Tab key never reaches {selector}")
