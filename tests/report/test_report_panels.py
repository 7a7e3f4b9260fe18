"""Several perturbations on one page: a switch between them, and no unit beside another's."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from browser import tab_to
from report_pages import data_of

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("report panels")

UNITS = ("degrees", "half-widths")


@pytest.fixture
def report(own: Path) -> Path:
    return own


def test_there_is_one_file_with_a_panel_for_each(report):
    assert [path.name for path in report.parent.glob("*.html")] == ["report.html"]
    for at, name in enumerate(UNITS):
        data = data_of(report, at)
        assert data["units"][0]["name"] == name
        assert data["clients"] == [2 * at, 2 * at + 1]
        assert {image["client"] for image in data["explorer"]["images"]} <= set(data["clients"])
        assert {len(image["sweeps"]) for image in data["explorer"]["images"]} == {at + 1}
    names = re.findall(r' id="([^"]*)"', report.read_text())
    assert len(names) == len(set(names))


def _switch(page: Page, number: int) -> None:
    page.locator(f"#tab-{number}").click()


def test_chart_table_and_explorer_change_together_with_their_units(page):
    sign = {"degrees": "°", "half-widths": " half-widths"}
    for number, here, away in ((1, *UNITS), (2, *reversed(UNITS)), (1, *UNITS)):
        _switch(page, number)
        expect(page.get_by_role("tabpanel")).to_have_count(1)
        panel = page.get_by_role("tabpanel").text_content()
        for chart in ("#curve-chart svg", "#acr-chart svg"):
            expect(page.locator(chart)).to_contain_text(f"radius in {here}")
        for part in ("#results table >> nth=0", "#explored", "#radius-text"):
            assert sign[here] in page.locator(part).text_content()
        assert away not in panel
        assert sign[away].strip() not in panel
        expect(page.locator("[data-client]")).to_have_count(2)
        expect(page.locator('input[name="sweep"]')).to_have_count(2 * (number - 1))


def test_what_was_set_in_a_panel_is_kept(page):
    lines = page.locator("#curve-chart path.mean")
    page.locator('[data-algorithm="0"]').uncheck()
    page.locator('[data-unit="1"]').check()
    _switch(page, 2)
    expect(lines).to_have_count(2)
    _switch(page, 1)
    expect(lines).to_have_count(1)
    expect(page.locator("#curve-chart svg")).to_contain_text("radius in radians")


def test_the_keyboard_switches_as_tabs_do(page):
    focus = page.locator(":focus")
    tab_to(page, "[role=tab]")
    expect(focus).to_have_id("tab-1")
    page.keyboard.press("ArrowRight")
    expect(focus).to_have_id("tab-2")
    expect(focus).to_have_attribute("aria-selected", "true")
    expect(focus).to_have_attribute("aria-controls", "perturbation-2")
    expect(focus).to_have_css("outline-style", "solid")
    panel = page.get_by_role("tabpanel")
    expect(panel.get_by_role("heading").first).to_contain_text("Translation, σ = 0.2")
    page.keyboard.press("ArrowRight")
    expect(focus).to_have_id("tab-1")
    expect(page.locator('[role=tab][tabindex="0"]')).to_have_count(1)


def _top(page: Page, selector: str) -> float:
    return page.locator(selector).evaluate("e => e.getBoundingClientRect().top")


def test_readers_stay_in_the_section_they_read(page):
    page.locator("#explorer").evaluate("e => e.scrollIntoView()")
    before = _top(page, "#explorer")
    _switch(page, 2)
    assert _top(page, "#explorer") == pytest.approx(before, abs=2)
    assert _top(page, ".tabs") == pytest.approx(0, abs=1)  # the switch stays in reach


def test_links_lead_to_the_panel(page):
    page.locator('#perturbations a[href="#perturbation-2"]').click()
    expect(page.get_by_role("tabpanel")).to_have_id("perturbation-2")
    assert 0 <= _top(page, "[role=tabpanel]") < 200


def test_names_are_unique_whichever_is_shown(page):
    for number in (1, 2):
        _switch(page, number)
        found = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
        assert len(found) == len(set(found))
        assert not any(name.endswith("--1") for name in found)
        labels = "all => all.filter(label => !label.control).length"
        assert page.locator("label[for]").evaluate_all(labels) == 0


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(windows, report, width):
    page = windows(report, width)
    for number in (1, 2):
        _switch(page, number)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        drawn = "svg => svg.viewBox.baseVal.width"
        assert page.locator("#curve-chart svg").evaluate(drawn) <= width


def test_paper_shows_every_panel_and_the_page_is_as_it_was(page):
    _switch(page, 2)
    page.locator('[data-unit="1"]').check()
    before = page.locator("main").inner_html()
    page.evaluate(
        "addEventListener('beforeprint', () => { window.onPaper ="
        " [...document.querySelectorAll('[role=tabpanel]')].map(panel => ({"
        "   words: panel.textContent, height: panel.offsetHeight,"
        "   chart: panel.querySelector('#curve-chart svg').textContent,"
        "   unfolded: panel.querySelector('details').open })); })"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")
    turned, shifted = page.evaluate("window.onPaper")
    for panel, axis, here, away in (
        (turned, "radius in degrees", "°", "half-widths"),
        (shifted, "radius in % of σ", "half-widths", "°"),
    ):
        assert axis in panel["chart"]
        assert here in panel["words"]
        assert away not in panel["words"]
        assert panel["height"] > 1000
        assert panel["unfolded"]
    assert page.locator("main").inner_html() == before
    expect(page.locator('[data-unit="1"]')).to_be_checked()
    expect(page.get_by_role("tabpanel")).to_have_count(1)


def test_without_scripts_all_panels_are_there(windows, report):
    page = windows(report, scripts=False)
    panels = page.get_by_role("tabpanel")
    expect(panels).to_have_count(2)
    assert min(panels.evaluate_all("all => all.map(panel => panel.offsetHeight)")) > 1000
    expect(page.locator(".tabs")).to_be_hidden()


def test_curves_are_those_of_the_clients_that_certify_it(report):
    for at in (0, 1):
        data = data_of(report, at)
        for run in data["runs"]:
            assert len(run["curves"]) == 2
            assert run["mean"] == pytest.approx(np.mean(run["acr"]))
