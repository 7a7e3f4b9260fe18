"""The report page: true words, nothing from outside, and a real browser that can use all of it."""

from __future__ import annotations

import base64
import hashlib
import html
import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Page, find_chromium, opened
from certifl.errors import StoreMismatch
from certifl.report import load_runs, write_report
from certifl.report.markup import Markup, el, embedded_json, table
from certifl.report.summary import client_curves, radius_grid
from certifl.report.words import percent, tenths
from report_factory import PIXEL, REGIMES, make_certificates, make_manifest, write_run, write_study

HOSTILE = "<script>document.title='broken'</script>\"'&$x ${y} </noscript><img src=x>"


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def page(study: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(study, out, title="Handwritten digits")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page made of files that try to get out of their place, with long names."""
    place = tmp_path_factory.mktemp("hostile")
    folders = []
    for number, quality in enumerate((0.6, 0.9)):
        manifest = make_manifest(f"regime{number}", f"{HOSTILE} {'long' * 30} {number}", 2, 24)
        manifest["data"]["name"] = manifest["deploys"] = manifest["command"] = HOSTILE
        manifest["data"]["class_names"] = [HOSTILE] * 10
        certificates = make_certificates(quality, 2, 12, {**PIXEL, "threat": HOSTILE}, seed=number)
        folder = place / f"run {number}"
        folders.append(write_run(folder, certificates, manifest, spec=f"# {HOSTILE}\n"))
    return write_report(folders, place / "report.html", title=HOSTILE, figures=False)


# The file --------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_with_figures_beside_it(page):
    assert page.stat().st_size < 1_000_000
    names = {p.name for p in (page.parent / "figures").iterdir()}
    assert {"curves.png", "curves.pdf", "curves.svg", "curves.csv"} <= names


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]


def test_the_page_names_nothing_outside_itself(page, hostile):
    for place in (page, hostile):
        text = place.read_text()
        links = _Links()
        links.feed(text)
        assert all(link.startswith(("data:", "#")) for link in links.found)
        style = re.findall(r"<style>(.*?)</style>", text, re.S)[0]
        assert "url(" not in style
        assert "@import" not in style
        assert "default-src 'none'" in html.unescape(text)


def test_only_the_pages_own_script_and_style_are_allowed(page):
    text = page.read_text()
    for kind, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in html.unescape(text)


def test_files_cannot_put_elements_on_the_page(hostile):
    links = _Links()
    links.feed(hostile.read_text())
    assert links.tags.count("script") == 2
    assert links.tags.count("img") == links.tags.count("noscript") == 2


def test_equal_results_give_an_equal_page(study, page, tmp_path):
    beside = page.with_name("again.html")
    write_report(study, beside, title="Handwritten digits", figures=False)
    assert beside.read_bytes() == page.read_bytes()


def test_the_numbers_in_the_page_are_the_stored_ones(study, page):
    data = _data(page)
    runs = load_runs(study)
    radii = radius_grid(runs)
    assert data["radii"] == radii.tolist()
    for shown, run in zip(data["runs"], runs, strict=True):
        assert shown["label"] == run.label
        assert shown["curves"] == client_curves(run, radii).round(5).tolist()


def _data(page: Path) -> dict:
    pattern = r'<script type="application/json" id="report-data">(.*?)</script>'
    (found,) = re.findall(pattern, page.read_text(), re.S)
    return json.loads(found)


def test_the_page_says_what_was_found_and_what_it_means(page):
    text = _words(page)
    assert "FedAvg has the largest average certified radius" in text
    assert "no difference shown from Personalised" in text
    assert "at least 99.9 % over the votes" in text
    assert "interpolated a second time" in text
    assert "The image is rotated about its centre" in text
    assert "certifl verify" in text
    assert "12.3 s" in text


def _words(page: Path) -> str:
    body = re.sub(r"<(script|style|noscript).*?</\1>", " ", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_one_run_has_a_page_without_comparison(study, tmp_path):
    out = write_report(study[:1], tmp_path / "one.html", figures=False)
    text = _words(out)
    assert "Local certifies" in text
    assert "Which regime" not in text
    assert "Differences between" not in text


def test_runs_that_differ_in_more_than_the_regime_are_marked(tmp_path):
    folders = []
    for number in range(2):
        certificates = make_certificates(0.8, 2, 12, seed=number)
        conditions = {**certificates.conditions, "alpha": 0.001 * (1 + number)}
        object.__setattr__(certificates, "conditions", conditions)
        manifest = make_manifest("fedavg", f"FedAvg {number}", 2, 24)
        folders.append(write_run(tmp_path / str(number), certificates, manifest))
    text = _words(write_report(folders, tmp_path / "report.html", figures=False))
    assert "differ in more than the regime: alpha (0.001, 0.002)" in text
    assert "at least 99.8 % over the votes" in text


def test_a_missing_run_leaves_no_page(tmp_path):
    with pytest.raises(StoreMismatch):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_markup_escapes_whatever_is_not_markup():
    assert el("p", {"title": '"<'}, "<b>&") == '<p title="&quot;&lt;">&lt;b&gt;&amp;</p>'
    assert el("p", None, el("b", None, "x")) == "<p><b>x</b></p>"
    assert isinstance(table("c", ["<h>"], [["<r>", Markup("<i></i>")]]), Markup)
    assert "<h>" not in table("c", ["<h>"], [["<r>"]])
    sealed = embedded_json("x", "</script><!--")
    assert sealed.count("<") == 2


# In a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a real browser")
    with opened(chromium) as shown:
        yield shown


@pytest.fixture
def shown(browser: Page, page: Path) -> Page:
    browser.messages.clear()
    browser.requests.clear()
    browser.view(1280)
    browser.open(page)
    return browser


def _count(shown: Page, selector: str) -> int:
    return shown.value(f"document.querySelectorAll({json.dumps(selector)}).length")


def _text(shown: Page, selector: str) -> str:
    return shown.value(f"document.querySelector({json.dumps(selector)}).textContent")


def _click(shown: Page, selector: str) -> None:
    shown.value(f"document.querySelector({json.dumps(selector)}).click()")
    shown.settle()


def _tab_to(shown: Page, selector: str) -> None:
    """Walk there with the Tab key alone."""
    for _ in range(60):
        shown.press("Tab", 9)
        if shown.value(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"the Tab key never reaches {selector}")


def test_the_page_loads_without_complaint_and_without_network(shown, page):
    assert shown.messages == []
    assert shown.requests == [page.resolve().as_uri()]


def test_charts_are_drawn(shown):
    assert _count(shown, "#curve-chart path.mean") == len(REGIMES)
    assert _count(shown, "#curve-chart path.band") == len(REGIMES)
    assert _count(shown, "#acr-chart path.marker") == len(REGIMES) * 10
    assert _count(shown, "[data-measure] path.mean") == len(REGIMES) * 2
    outlines = "[...document.querySelectorAll('svg path')].map(p => p.getAttribute('d'))"
    assert not any("NaN" in outline for outline in shown.value(outlines))


def test_regimes_lines_and_bands_can_be_switched(shown):
    _click(shown, '[data-regime="2"]')
    assert _count(shown, "#curve-chart path.mean") == len(REGIMES) - 1
    assert _count(shown, '#curve-chart [data-run="2"]') == 0
    assert "Personalised" not in _text(shown, "#readout")
    _click(shown, '[data-regime="2"]')
    assert _count(shown, '#curve-chart [data-run="2"]') == 1
    _click(shown, "#show-band")
    assert _count(shown, "#curve-chart path.band") == 0
    _click(shown, "#show-clients")
    assert _count(shown, "#curve-chart path.client") == len(REGIMES) * 10


def test_mean_and_band_follow_the_chosen_clients(shown, page):
    data = _data(page)
    _click(shown, "#clients-none")
    assert "at least one regime and one client" in _text(shown, "#readout")
    _click(shown, '[data-client="3"]')
    _click(shown, '[data-client="7"]')
    at = int(shown.value("document.getElementById('radius').value"))
    curves = data["runs"][0]["curves"]
    pair = sorted((curves[3][at], curves[7][at]))
    expected = f"{percent(sum(pair) / 2)}{tenths(pair[0])} to {tenths(pair[1])}"
    assert _text(shown, "#readout > div").endswith(expected)
    _click(shown, "#clients-all")
    assert _count(shown, "[data-client]:checked") == 10


def test_the_keyboard_reaches_and_works_the_controls(shown):
    _tab_to(shown, "#radius")
    before = _text(shown, "#radius-text")
    shown.press("ArrowRight", 39)
    assert _text(shown, "#radius-text") != before
    spoken = "document.getElementById('radius').getAttribute('aria-valuetext')"
    assert shown.value(spoken) == _text(shown, "#radius-text")
    _tab_to(shown, '[data-regime="0"]')
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert shown.value(outline) == "solid"
    shown.press(" ", 32, text=" ")
    assert _count(shown, '#curve-chart [data-run="0"]') == 0
    _tab_to(shown, "[data-client]")
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
        readings.append(float(_text(shown, "#radius-text").rstrip("°")))
    assert readings[0] < readings[1]
    assert 4 < readings[0] < 6
    assert 15 < readings[1] < 17


def test_the_unit_can_be_changed_everywhere(shown):
    assert "degrees" in _text(shown, "#curve-chart svg")
    _click(shown, '[data-unit="1"]')
    assert "radius in radians" in _text(shown, "#curve-chart svg")
    assert "radius in radians" in _text(shown, "#acr-chart svg")
    assert _text(shown, "#radius-text").endswith(" radians")


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
    assert _count(shown, "#curve-chart path.mean") == len(REGIMES)


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
    assert _count(shown, "h1") == 1


def test_hostile_names_stay_text(browser, hostile):
    browser.messages.clear()
    browser.view(1280)
    browser.open(hostile)
    assert browser.messages == []
    assert browser.value("document.title") == HOSTILE
    assert HOSTILE in _text(browser, "#curves .regime span")
    assert _count(browser, "#curve-chart path.mean") == 2


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
