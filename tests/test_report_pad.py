"""The explorer's pad in a real browser: shifts in both directions, what is certified there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from browser import Windows, tab_to
from certifl.certification.sweeps import SIDE
from certifl.report import load_runs, write_report
from plane_factory import LOOKS, pixels_at, plane_runs
from report_pages import data_of

MIDDLE = (SIDE * SIDE - 1) // 2
BOTH = 'input[name="walk"][value="2"]'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return plane_runs(tmp_path_factory.mktemp("shifted"))


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(runs, place, figures=False)


@pytest.fixture
def shown(windows: Windows, page: Path) -> Page:
    shown = windows(page)
    open_pad(shown)
    return shown


def open_pad(shown: Page) -> None:
    click(shown, "#pictures label:nth-of-type(1) input")
    click(shown, BOTH)


def click(shown: Page, selector: str) -> None:
    shown.locator(selector).click()


def count(shown: Page, selector: str) -> int:
    return shown.locator(selector).count()


def text(shown: Page, selector: str) -> str:
    return shown.locator(selector).text_content() or ""


def box_of(shown: Page, selector: str) -> tuple[float, float, float, float]:
    """Left, top, width and height in the window, after scrolling there."""
    return shown.locator(selector).evaluate(
        "e => { e.scrollIntoView({ block: 'center' }); const b = e.getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; }"
    )


def drag(shown: Page, *points: tuple[float, float]) -> None:
    shown.mouse.move(*points[0])
    shown.mouse.down()
    for point in points[1:]:
        shown.mouse.move(*point)
    shown.mouse.up()


def touch(shown: Page, *points: tuple[float, float]) -> None:
    """The same with a finger."""
    session = shown.context.new_cdp_session(shown)
    for number, (x, y) in enumerate(points):
        kind = "touchMove" if number else "touchStart"
        event = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
        session.send("Input.dispatchTouchEvent", event)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def spot(shown: Page, right: int, down: int) -> tuple[float, float]:
    """Where in the window a point lies, counted from the middle as the picture moves."""
    x, y, width, height = box_of(shown, "#pad")
    half = SIDE // 2
    return x + (half + right + 0.5) * width / SIDE, y + (half + down + 0.5) * height / SIDE


def point(right: int, down: int) -> int:
    """The number of that point: the picture moves against the sign of what is read."""
    return MIDDLE - right - SIDE * down


def at(shown: Page) -> int:
    return int(shown.evaluate("document.getElementById('pad').getAttribute('aria-valuenow')"))


def test_a_drag_shifts_the_image_both_ways(shown, page):
    assert at(shown) == MIDDLE
    assert text(shown, "#shift-text") == "none"
    drag(shown, spot(shown, 0, 0), spot(shown, 1, 1), spot(shown, 4, -3))
    assert at(shown) == point(4, -3)
    assert text(shown, "#shift-text") == "0.4 to the right, 0.3 up; length 0.5 half-widths"
    plane = data_of(page)["explorer"]["images"][0]["plane"]
    assert plane["texts"][SIDE // 2 - 4] == "0.4"
    shown.mouse.move(*spot(shown, -5, 5))  # let go: the pointer alone moves nothing
    assert at(shown) == point(4, -3)
    drag(shown, spot(shown, -2, 0))
    assert text(shown, "#shift-text") == "0.2 to the left; length 0.2 half-widths"


def test_a_finger_shifts_it_without_moving_the_page(windows, page):
    shown = windows(page, 390)
    open_pad(shown)
    before = spot(shown, 0, 0)
    scrolled = shown.evaluate("scrollY")
    touch(shown, before, spot(shown, -1, 2), spot(shown, -6, 6))
    assert at(shown) == point(-6, 6)
    assert shown.evaluate("scrollY") == scrolled


def test_the_keyboard_reaches_the_pad_and_shifts(shown):
    tab_to(shown, "#pad")
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        shown.keyboard.press(key)
    assert at(shown) == point(2, 1)
    told = "document.activeElement.getAttribute('aria-valuetext')"
    assert shown.evaluate(told).startswith(
        "0.2 to the right, 0.1 down; length 0.224 half-widths. "
    )
    assert "Fedavg: class" in shown.evaluate(told)
    for _ in range(9):
        shown.keyboard.press("ArrowLeft")
    assert at(shown) == point(-6, 1)  # it ends at the border
    shown.keyboard.press("Home")
    assert at(shown) == MIDDLE


@pytest.mark.parametrize("number", range(len(LOOKS)))
def test_the_picture_is_the_librarys_own_interpolation(shown, number):
    click(shown, f"#pictures label:nth-of-type({number + 1}) input")
    for right, down in ((0, 0), (1, 0), (3, -4), (-6, 6)):
        drag(shown, spot(shown, right, down))
        drawn = shown.evaluate(
            "(s => { const c = s.cloneNode(), n = c.width / 8, out = [], pen = c.getContext('2d');"
            " pen.drawImage(s, 0, 0); const all = pen.getImageData(0, 0, c.width, c.height).data;"
            " for (let y = 0; y < 8; y++) for (let x = 0; x < 8; x++) {"
            " const at = 4 * (Math.floor((y + .5) * n) * c.width + Math.floor((x + .5) * n));"
            " out.push(...all.slice(at, at + 3)); }"
            " return out; })(document.getElementById('picture'))"
        )
        expected = pixels_at(number, point(right, down))
        assert np.abs(np.reshape(drawn, (8, 8, 3)) - expected).max() <= 0.51


def test_every_regime_says_what_is_certified_and_what_only_predicted(shown, page):
    image = data_of(page)["explorer"]["images"][0]
    seen = {run["run"]: run for run in image["runs"]}
    assert seen[2]["plane"] is None
    assert shown.evaluate("document.querySelector('[data-walker=\"2\"]').hidden")
    for right, down in ((0, 0), (1, 1), (2, -2), (6, 6)):
        drag(shown, spot(shown, right, down))
        for place in (0, 1):
            said = text(shown, f'[data-walker="{place}"] .walker-says')
            run, here = seen[place], point(right, down)
            label = run["plane"]["winners"][here][0][0]
            assert f"class {label}, 90 of 100 votes" in said
            if run["ends"] is None:
                assert "nothing is certified" in said
            elif run["plane"]["inside"][here] == "1":
                assert "inside the certified disc" in said
            else:
                assert "outside the certified disc, predicted at this point only" in said


def test_flags_of_the_plane_are_those_of_the_stored_radius(runs, page):
    image = data_of(page)["explorer"]["images"][1]
    values = np.array(image["plane"]["values"])
    lengths = np.hypot(values[None, :], values[:, None]).ravel()
    for run in image["runs"][:2]:
        own = load_runs(runs)[run["run"]].certificates
        (row,) = np.flatnonzero((own.index == image["index"]) & (own.client == image["client"]))
        radius = -1.0 if own.abstained[row] else own.radius[row]
        clear = np.abs(lengths - radius) > 1e-6
        flags = np.array([flag == "1" for flag in run["plane"]["inside"]])
        assert (flags == (lengths <= radius))[clear].all()
        assert flags.sum() > 1 or radius < values[-1] / (SIDE // 2)


def test_the_certified_disc_is_drawn_to_scale(shown, page):
    image = data_of(page)["explorer"]["images"][0]
    wide = shown.evaluate("document.querySelector('#pad svg').viewBox.baseVal.width")
    step = image["plane"]["values"][1] - image["plane"]["values"][0]
    radii = [run["ends"][1] for run in image["runs"][:2] if run["ends"]]
    drawn = shown.evaluate(
        "[...document.querySelectorAll('#pad .disc')].map(d => Number(d.getAttribute('r')))"
    )
    assert drawn == pytest.approx([radius / step * wide / SIDE for radius in radii])
    assert len(drawn) >= 1
    assert count(shown, '[data-walker="1"] .strip rect.cell') == SIDE * SIDE


def test_a_click_on_a_map_goes_there(shown):
    x, y, width, _ = box_of(shown, '[data-walker="1"] .strip svg')
    drag(shown, (x + width - 2, y + 2))
    assert at(shown) == point(6, -6)


def test_the_axes_are_there_as_before(shown):
    click(shown, 'input[name="walk"][value="1"]')
    assert shown.evaluate("document.getElementById('both').hidden")
    assert not shown.evaluate("document.getElementById('along').hidden")
    assert not shown.evaluate("document.querySelector('[data-walker=\"2\"]').hidden")
    assert count(shown, ".strip .held") >= 1
    click(shown, BOTH)
    assert shown.evaluate("document.getElementById('along').hidden")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_pad_and_maps_fit_the_window(windows, page, width):
    shown = windows(page, width)
    open_pad(shown)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.evaluate("document.querySelector('#pad').getBoundingClientRect().right") <= width


def test_the_disc_is_seen_in_light_and_dark(shown):
    look = (
        "(s => [s.stroke, s.fill, getComputedStyle(document.getElementById('pad'))"
        ".backgroundColor])(getComputedStyle(document.querySelector('#pad .disc')))"
    )
    light = shown.evaluate(look)
    shown.emulate_media(color_scheme="dark")
    dark = shown.evaluate(look)
    for stroke, fill, paper in (light, dark):
        assert stroke == fill
        assert math.dist(_colour(stroke), _colour(paper)) > 150
    assert light != dark


def _colour(css: str) -> list[int]:
    return [int(part) for part in css[css.index("(") + 1 : -1].split(",")[:3]]


def test_the_page_says_ball_and_sampled_points(page):
    words = page.read_text()
    assert "EVERY shift, across and down together, of at most its l2 length" in words
    assert "at one of 13 × 13 sampled shifts, 100 votes each" in words
