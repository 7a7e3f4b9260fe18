"""Several perturbations on one page: a switch between them, and no unit beside another's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from browser import Page, find_chromium, opened
from browsing import click, count, some_browser, tab_to, text
from certifl.certification.certificates import Certificates
from certifl.report import write_report
from explorer_factory import TURN
from plane_factory import TRANSLATION, write_planes
from report_factory import ROTATION, make_certificates, make_manifest, write_run
from report_pages import data_of

UNITS = ("degrees", "half-widths")


def two_perturbations(quality: float, seed: int) -> Certificates:
    """Clients 0 and 1 certify rotations, 2 and 3 translations."""
    parts = []
    for first, perturbation in ((0, ROTATION), (2, TRANSLATION)):
        made = make_certificates(quality, 2, 12, perturbation, seed=seed)
        client, index = made.client + first, made.index + 12 * first
        parts.append(dataclasses.replace(made, client=client, index=index))
    return Certificates.concatenate(parts)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    folders = []
    for number, regime in enumerate(("local", "fedavg")):
        certificates = two_perturbations(0.7 + 0.2 * number, number)
        manifest = make_manifest(regime, regime.capitalize(), 4, 48)
        folder = write_run(place / regime, certificates, manifest)
        folders.append(folder)
        record = json.loads(write_planes(folder, (0, 12, 24, 36)).read_text())
        for image in record["images"][:2]:
            image["walks"], image["plane"] = [{**image["walks"][0], **TURN}], None
        (folder / "explorer.json").write_text(json.dumps(record))
    return write_report(folders, place / "report.html", figures=False)


browser = pytest.fixture(scope="module")(some_browser)


@pytest.fixture
def shown(browser: Page, page: Path) -> Page:
    browser.messages.clear()
    browser.view(1280)
    browser.open(page)
    return browser


def _tab(number: int) -> str:
    return f"#tab-{number}"


def test_there_is_one_file_with_a_panel_for_each(page):
    assert [path.name for path in page.parent.glob("*.html")] == ["report.html"]
    for at, name in enumerate(UNITS):
        data = data_of(page, at)
        assert data["units"][0]["name"] == name
        assert data["clients"] == [2 * at, 2 * at + 1]
        assert {image["client"] for image in data["explorer"]["images"]} <= set(data["clients"])
        assert all((image["plane"] is None) == (at == 0) for image in data["explorer"]["images"])
    names = re.findall(r' id="([^"]*)"', page.read_text())
    assert len(names) == len(set(names))


def test_chart_table_and_explorer_change_together_with_their_units(shown):
    for number, here, away in ((1, *UNITS), (2, *reversed(UNITS)), (1, *UNITS)):
        click(shown, _tab(number))
        assert shown.messages == []
        assert count(shown, "[role=tabpanel]") == 1
        panel = text(shown, "[role=tabpanel]")
        sign = {"degrees": "°", "half-widths": " half-widths"}
        assert f"radius in {here}" in text(shown, "#curve-chart svg")
        assert f"radius in {here}" in text(shown, "#acr-chart svg")
        assert sign[here] in text(shown, "#results table")
        assert sign[here] in text(shown, "#walkers")
        assert sign[here] in text(shown, "#radius-text")
        assert away not in panel
        assert sign[away].strip() not in panel
        assert count(shown, "[data-client]") == 2
        assert (count(shown, "#pad") == 1) == (number == 2)


def test_what_was_set_in_a_panel_is_kept(shown):
    click(shown, '[data-regime="0"]')
    click(shown, '[data-unit="1"]')
    click(shown, _tab(2))
    assert count(shown, "#curve-chart path.mean") == 2
    click(shown, _tab(1))
    assert count(shown, "#curve-chart path.mean") == 1
    assert "radius in radians" in text(shown, "#curve-chart svg")


def test_the_keyboard_switches_as_tabs_do(shown):
    tab_to(shown, "[role=tab]")
    assert shown.value("document.activeElement.id") == "tab-1"
    shown.press("ArrowRight", 39)
    assert shown.value("document.activeElement.id") == "tab-2"
    assert shown.value("document.activeElement.getAttribute('aria-selected')") == "true"
    assert shown.value("document.activeElement.getAttribute('aria-controls')") == "perturbation-2"
    assert shown.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert text(shown, "[role=tabpanel] h2").startswith("Translation, σ = 0.2")
    shown.press("ArrowRight", 39)
    assert shown.value("document.activeElement.id") == "tab-1"
    assert count(shown, '[role=tab][tabindex="0"]') == 1


def test_readers_stay_in_the_section_they_read(shown):
    shown.value("document.getElementById('explorer').scrollIntoView()")
    shown.settle()
    place = "document.getElementById('explorer').getBoundingClientRect().top"
    before = shown.value(place)
    click(shown, _tab(2))
    assert shown.value(place) == pytest.approx(before, abs=2)
    bar = shown.value("document.querySelector('.tabs').getBoundingClientRect().top")
    assert bar == pytest.approx(0, abs=1)  # the switch stays in reach


def test_links_lead_to_the_panel(shown):
    click(shown, '#own a[href="#perturbation-2"]')
    assert shown.value("document.querySelector('[role=tabpanel]').id") == "perturbation-2"
    top = shown.value("document.querySelector('[role=tabpanel]').getBoundingClientRect().top")
    assert 0 <= top < 200


def test_names_are_unique_whichever_is_shown(shown):
    names = "[...document.querySelectorAll('[id]')].map(e => e.id)"
    for number in (1, 2):
        click(shown, _tab(number))
        found = shown.value(names)
        assert len(found) == len(set(found))
        assert not any(name.endswith("--1") for name in found)
        labels = "[...document.querySelectorAll('label[for]')].filter(l => !l.control).length"
        assert shown.value(labels) == 0


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(shown, width):
    shown.view(width, phone=width < 500)
    for number in (1, 2):
        click(shown, _tab(number))
        assert shown.value("document.documentElement.scrollWidth") == width
        drawn = shown.value("document.querySelector('#curve-chart svg').viewBox.baseVal.width")
        assert drawn <= width


def test_paper_shows_every_panel_and_the_page_is_as_it_was(shown):
    click(shown, _tab(2))
    click(shown, '[data-unit="1"]')
    before = shown.value("document.querySelector('main').innerHTML")
    shown.value(
        "addEventListener('beforeprint', () => { window.onPaper ="
        " [...document.querySelectorAll('[role=tabpanel]')].map(panel => ({"
        "   words: panel.textContent, height: panel.offsetHeight,"
        "   chart: panel.querySelector('#curve-chart svg').textContent,"
        "   unfolded: panel.querySelector('details').open })); })"
    )
    assert shown.print().startswith(b"%PDF")
    turned, shifted = shown.value("window.onPaper")
    for panel, axis, here, away in (
        (turned, "radius in degrees", "°", "half-widths"),
        (shifted, "radius in % of σ", "half-widths", "°"),
    ):
        assert axis in panel["chart"]
        assert here in panel["words"]
        assert away not in panel["words"]
        assert panel["height"] > 1000
        assert panel["unfolded"]
    assert shown.value("document.querySelector('main').innerHTML") == before
    assert shown.value("document.querySelector('[data-unit=\"1\"]').checked") is True
    assert count(shown, "[role=tabpanel]") == 1
    assert shown.messages == []


def test_without_scripts_all_panels_are_there(page):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a real browser")
    with opened(chromium) as plain:
        plain.view(1280)
        plain.without_scripts()
        plain.open(page)
        seen = "[...document.querySelectorAll('[role=tabpanel]')].map(p => p.offsetHeight)"
        assert all(height > 1000 for height in plain.value(seen))
        assert len(plain.value(seen)) == 2
        assert plain.value("document.querySelector('.tabs').offsetHeight") == 0


def test_curves_are_those_of_the_clients_that_certify_it(page):
    for at in (0, 1):
        data = data_of(page, at)
        for run in data["runs"]:
            assert len(run["curves"]) == 2
            assert run["mean"] == pytest.approx(np.mean(run["acr"]))
