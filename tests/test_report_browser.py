"""The report page in a real browser: drawn, switched, worked by keyboard, in every width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browser import Page, find_chromium, opened
from browsing import click, count, some_browser, tab_to, text
from certifl.report.words import percent, tenths
from report_factory import REGIMES
from report_pages import HOSTILE, data_of, hostile_page, study_page, study_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return study_runs(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_page(study, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_page(tmp_path_factory.mktemp("hostile"))


browser = pytest.fixture(scope="module")(some_browser)


@pytest.fixture
def shown(browser: Page, page: Path) -> Page:
    browser.messages.clear()
    browser.requests.clear()
    browser.view(1280)
    browser.open(page)
    return browser


def test_the_page_loads_without_complaint_and_without_network(shown, page):
    assert shown.messages == []
    outside = [asked for asked in shown.requests if not asked.startswith("data:")]
    assert outside == [page.resolve().as_uri()]


def test_charts_are_drawn(shown):
    assert count(shown, "#curve-chart path.mean") == len(REGIMES)
    assert count(shown, "#curve-chart path.band") == len(REGIMES)
    assert count(shown, "#acr-chart path.marker") == len(REGIMES) * 10
    assert count(shown, "[data-measure] path.mean") == len(REGIMES) * 2
    outlines = "[...document.querySelectorAll('svg path')].map(p => p.getAttribute('d'))"
    assert not any("NaN" in outline for outline in shown.value(outlines))


def test_regimes_lines_and_bands_can_be_switched(shown):
    click(shown, '[data-regime="2"]')
    assert count(shown, "#curve-chart path.mean") == len(REGIMES) - 1
    assert count(shown, '#curve-chart [data-run="2"]') == 0
    assert "Personalised" not in text(shown, "#readout")
    click(shown, '[data-regime="2"]')
    assert count(shown, '#curve-chart [data-run="2"]') == 1
    click(shown, "#show-band")
    assert count(shown, "#curve-chart path.band") == 0
    click(shown, "#show-clients")
    assert count(shown, "#curve-chart path.client") == len(REGIMES) * 10


def test_mean_and_band_follow_the_chosen_clients(shown, page):
    data = data_of(page)
    click(shown, "#clients-none")
    assert "at least one regime and one client" in text(shown, "#readout")
    click(shown, '[data-client="3"]')
    click(shown, '[data-client="7"]')
    at = int(shown.value("document.getElementById('radius').value"))
    curves = data["runs"][0]["curves"]
    pair = sorted((curves[3][at], curves[7][at]))
    expected = f"{percent(sum(pair) / 2)}{tenths(pair[0])} to {tenths(pair[1])}"
    assert text(shown, "#readout > div").endswith(expected)
    click(shown, "#clients-all")
    assert count(shown, "[data-client]:checked") == 10


def test_the_keyboard_reaches_and_works_the_controls(shown):
    tab_to(shown, "#radius")
    before = text(shown, "#radius-text")
    shown.press("ArrowRight", 39)
    assert text(shown, "#radius-text") != before
    spoken = "document.getElementById('radius').getAttribute('aria-valuetext')"
    assert shown.value(spoken) == text(shown, "#radius-text")
    tab_to(shown, '[data-regime="0"]')
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert shown.value(outline) == "solid"
    shown.press(" ", 32, text=" ")
    assert count(shown, '#curve-chart [data-run="0"]') == 0
    tab_to(shown, "[data-client]")
    chip = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert shown.value(chip) == "solid"


def test_the_pointer_reads_values_off_the_chart(shown):
    shown.value("document.getElementById('curve-chart').scrollIntoView()")
    box = shown.value(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('#curve-chart svg')"
        ".getBoundingClientRect())"
    )
    readings = []
    for share in (0.3, 0.9):
        shown.move_mouse(box[0] + share * box[2], box[1] + box[3] / 2)
        readings.append(float(text(shown, "#radius-text").rstrip("°")))
    assert readings[0] < readings[1]
    assert 4 < readings[0] < 6
    assert 15 < readings[1] < 17


def test_the_unit_can_be_changed_everywhere(shown):
    assert "degrees" in text(shown, "#curve-chart svg")
    click(shown, '[data-unit="1"]')
    assert "radius in radians" in text(shown, "#curve-chart svg")
    assert "radius in radians" in text(shown, "#acr-chart svg")
    assert text(shown, "#radius-text").endswith(" radians")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
@pytest.mark.parametrize("which", ["page", "hostile"])
def test_nothing_is_wider_than_the_window(browser, request, width, which):
    browser.view(width, phone=width < 500)
    browser.open(request.getfixturevalue(which))
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.settle()
    assert browser.value("document.documentElement.scrollWidth") == width
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, .chips')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.value(outside) == []


def test_charts_fit_again_when_the_window_changes(shown):
    shown.view(375, phone=True)
    shown.settle()
    width = "document.querySelector('#curve-chart svg').viewBox.baseVal.width"
    assert shown.value(width) <= 375
    assert count(shown, "#curve-chart path.mean") == len(REGIMES)


def test_light_and_dark_follow_the_reader(shown, page):
    contrast = (
        "(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).map(Number)"
        ".reduce((a, b) => a + b)))(getComputedStyle(document.body))"
    )
    paper, ink = shown.value(contrast)
    assert paper > 600 > 150 > ink
    shown.view(1280, dark=True)
    paper, ink = shown.value(contrast)
    assert paper < 150 < 600 < ink
    line = "getComputedStyle(document.querySelector('#curve-chart path.mean')).stroke"
    dark = shown.value(line)
    shown.view(1280)
    assert shown.value(line) != dark


def test_what_is_shown_has_a_name_for_screen_readers(shown):
    unnamed = (
        "[...document.querySelectorAll('input, [role=img], [role=region], button')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length))"
        ").map(e => e.outerHTML)"
    )
    assert shown.value(unnamed) == []
    assert shown.value("document.documentElement.lang") == "en"
    assert count(shown, "h1") == 1


def test_hostile_names_stay_text(browser, hostile):
    browser.messages.clear()
    browser.view(1280)
    browser.open(hostile)
    assert browser.messages == []
    assert browser.value("document.title") == HOSTILE
    assert HOSTILE in text(browser, "#curves .regime span")
    assert count(browser, "#curve-chart path.mean") == 2


def test_without_scripts_the_pictures_are_there(page):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a real browser")
    with opened(chromium) as plain:
        plain.view(1280)
        plain.without_scripts()
        plain.open(page)
        wide = "[...document.querySelectorAll('img.fallback')].map(i => i.naturalWidth)"
        assert all(width > 300 for width in plain.value(wide))
        assert len(plain.value(wide)) == 2
        assert (
            plain.value("getComputedStyle(document.querySelector('.controls')).display") == "none"
        )
        assert plain.messages == []


# Advice, units, claims --------------------------------------------------------------------------


def _set(shown: Page, selector: str, value: int) -> None:
    """Move a slider as a reader does, with its event."""
    name = json.dumps(selector)
    shown.value(
        f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('input')); }})"
        f"(document.querySelector({name}))"
    )
    shown.settle()


def _rows(shown: Page) -> list[list[str]]:
    cells = "[...row.children].map(cell => cell.textContent)"
    return shown.value(
        f"[...document.querySelectorAll('#advice-table tbody tr')].map(row => {cells})"
    )


def test_the_advice_at_no_accuracy_is_the_one_written_down(shown):
    groups = "document.getElementById('advice').innerText"
    written = _rows(shown), shown.value(groups)
    _set(shown, "#accepted", 100)
    assert (_rows(shown), shown.value(groups)) != written
    _set(shown, "#accepted", 0)
    assert (_rows(shown), shown.value(groups)) == written


@pytest.mark.parametrize("least", [60, 85, 95])
def test_an_accepted_accuracy_rules_regimes_out(shown, page, least):
    _set(shown, "#accepted", least)
    data = data_of(page)
    labels = [run["label"] for run in data["runs"]]
    for cells, client in zip(_rows(shown), data["advice"]["clients"], strict=True):
        reach = [i for i in client["order"] if 100 * client["accuracy"][i][0] >= least - 1e-7]
        if not reach:
            assert cells[2].startswith("none: the best reaches")
            continue
        assert cells[2].split(";")[0] == labels[reach[0]]
        assert cells[3] == client["acr"][reach[0]]
        ahead = client["pairs"][f"{reach[0]}-{reach[1]}"][0] if len(reach) > 1 else "–"
        assert cells[5] == ahead
        out = [labels[i] for i in range(len(labels)) if i not in reach]
        assert not any(name in cells[2] for name in out)


def test_the_keyboard_says_which_accuracy_is_accepted(shown):
    tab_to(shown, "#accepted")
    for _ in range(3):
        shown.press("ArrowRight", 39)
    assert text(shown, "#accepted-text") == "3 %"
    assert shown.value("document.activeElement.getAttribute('aria-valuetext')") == "3 %"


def test_radii_as_a_share_of_sigma_and_accuracies_as_shares(shown, page):
    click(shown, '[data-unit="2"]')
    assert "radius in % of σ" in text(shown, "#curve-chart svg")
    data = data_of(page)
    _set(shown, "#radius", len(data["radii"]) - 1)
    assert float(text(shown, "#radius-text").split()[0]) == pytest.approx(100, rel=0.02)
    _set(shown, "#radius", 0)
    percents = float(text(shown, "#readout b").split()[0])
    click(shown, '[data-accuracy="1"]')
    assert float(text(shown, "#readout b")) == pytest.approx(percents / 100)
    assert "80 %" not in text(shown, "#curve-chart svg")


# The explorer ------------------------------------------------------------------------------------


def _says(shown: Page, place: int) -> str:
    return text(shown, f'[data-walker="{place}"] .walker-says')


def test_the_explorer_shows_the_picture_of_the_step(shown):
    at = "document.getElementById('picture').getContext('2d').getImageData(9, 9, 1, 1).data[0]"
    shown.value("document.getElementById('explorer').scrollIntoView()")
    for step in (15, 4, 30):
        _set(shown, "#step", step)
        assert shown.value(at) == 8 * step  # as the made-up strip has it


def test_the_explorer_says_whether_the_step_is_certified(shown, page):
    image = next(i for i in data_of(page)["explorer"]["images"] if len(i["runs"]) == 3)
    shown.value("document.querySelectorAll('#pictures input')[0].click()")
    for step in (15, 17, 21, 0):
        _set(shown, "#step", step)
        for seen in image["runs"]:
            said, walk = _says(shown, seen["run"]), seen["walks"][0]
            if seen["ends"] is None:
                assert "nothing is certified" in said
                continue
            inside = walk["inside"][step] == "1"
            assert ("inside" if inside else "outside") + " the certified range" in said
            label = walk["winners"][step][0][0]
            assert f"class {label}, 80 of 100 votes" in said
            kept = label == seen["predicted"]
            assert step == 15 or ("still the same class" if kept else "another class") in said
            assert ("right" if label == image["label"] else "wrong") in said


def test_the_keyboard_picks_an_image_and_deforms_it(shown):
    tab_to(shown, '#pictures input[name="picture"]')
    before = text(shown, "#picture-words")
    shown.press("ArrowRight", 39)
    assert text(shown, "#picture-words") != before
    tab_to(shown, "#step")
    shown.press("ArrowRight", 39)
    spoken = "document.activeElement.getAttribute('aria-valuetext')"
    assert shown.value(spoken).startswith("2.4° counter-clockwise. ")
    shown.press("ArrowLeft", 37)
    shown.press("ArrowLeft", 37)
    assert text(shown, "#step-text") == "2.4° clockwise"


def test_a_click_on_a_strip_takes_the_reader_there(shown):
    shown.value("document.querySelector('.walker:not([hidden]) .strip').scrollIntoView()")
    shown.value(
        "(s => { const b = s.getBoundingClientRect(); s.dispatchEvent(new MouseEvent('click',"
        " { clientX: b.right - 10, clientY: b.top + 5 })); })"
        "(document.querySelector('.walker:not([hidden]) .strip svg'))"
    )
    assert shown.value("document.getElementById('step').value") == "30"


def test_only_regimes_that_explored_an_image_speak_of_it(shown, page):
    images = data_of(page)["explorer"]["images"]
    for number, image in enumerate(images):
        shown.value(f"document.querySelectorAll('#pictures input')[{number}].click()")
        visible = "[...document.querySelectorAll('[data-walker]')].filter(r => !r.hidden)"
        places = shown.value(f"{visible}.map(r => Number(r.dataset.walker))")
        assert places == [seen["run"] for seen in image["runs"]]


def test_the_certified_range_is_drawn_to_scale(shown, page):
    shown.value("document.querySelectorAll('#pictures input')[0].click()")
    image = data_of(page)["explorer"]["images"][0]
    for seen in image["runs"]:
        bar = f'[data-walker="{seen["run"]}"] .held'
        if seen["ends"] is None:
            assert count(shown, bar) == 0
            continue
        x, width, whole = shown.value(
            f"(b => [Number(b.getAttribute('x')), Number(b.getAttribute('width')),"
            f" b.ownerSVGElement.viewBox.baseVal.width])(document.querySelector('{bar}'))"
        )
        values = image["walks"][0]["values"]
        wide = (whole - 20) * (seen["ends"][1] - seen["ends"][0]) / (values[-1] - values[0])
        assert width == pytest.approx(max(2, wide), abs=0.5)
        assert x + width / 2 == pytest.approx(whole / 2, abs=0.5)
