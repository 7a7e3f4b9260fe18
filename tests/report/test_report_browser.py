"""The report page in a real browser: drawn, switched, worked by keyboard, in every width."""

from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from browser import tab_to, wait_until
from certifl.report.wording import percent, tenths
from report_factory import REGIMES
from report_pages import CLIENTS, HOSTILE, data_of

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("report browser")


@pytest.fixture
def report(study_report: Path) -> Path:
    return study_report


def test_the_page_loads_without_complaint_and_without_network(windows, report):
    windows(report)
    assert windows.complaints == []
    outside = [asked for asked in windows.requests if not asked.startswith("data:")]
    assert outside == [report.resolve().as_uri()]


def test_charts_are_drawn(page):
    expect(page.locator("#curve-chart path.mean")).to_have_count(len(REGIMES))
    expect(page.locator("#curve-chart path.band")).to_have_count(len(REGIMES))
    expect(page.locator("#acr-chart path.marker")).to_have_count(len(REGIMES) * CLIENTS)
    expect(page.locator("[data-measure] path.mean")).to_have_count(len(REGIMES) * 2)
    expect(page.locator("svg path[d*=NaN]")).to_have_count(0)


def test_regimes_lines_and_bands_can_be_switched(page):
    chart = page.locator("#curve-chart")
    page.locator('[data-algorithm="2"]').uncheck()
    expect(chart.locator("path.mean")).to_have_count(len(REGIMES) - 1)
    expect(chart.locator('[data-run="2"]')).to_have_count(0)
    expect(page.locator("#readout")).not_to_contain_text("Personalized")
    page.locator('[data-algorithm="2"]').check()
    expect(chart.locator('[data-run="2"]')).to_have_count(1)
    page.get_by_label("Band: smallest to largest client").uncheck()
    expect(chart.locator("path.band")).to_have_count(0)
    page.get_by_label("One line per client").check()
    expect(chart.locator("path.client")).to_have_count(len(REGIMES) * CLIENTS)


def test_mean_and_band_follow_the_chosen_clients(page, report):
    data, readout = data_of(report), page.locator("#readout")
    page.locator("#clients-none").click()
    expect(readout).to_contain_text("at least one algorithm and one client")
    page.locator('[data-client="1"]').check()
    page.locator('[data-client="3"]').check()
    at = int(page.locator("#radius").input_value())
    curves = data["runs"][0]["curves"]
    pair = sorted((curves[1][at], curves[3][at]))
    first = readout.locator("> div").first
    expect(first.locator("b")).to_have_text(percent(sum(pair) / 2))
    expect(first.locator("small")).to_have_text(f"{tenths(pair[0])} to {tenths(pair[1])}")
    page.locator("#clients-all").click()
    expect(page.locator("[data-client]:checked")).to_have_count(CLIENTS)


def test_the_keyboard_reaches_and_works_the_controls(page):
    said, focus = page.locator("#radius-text"), page.locator(":focus")
    tab_to(page, "#radius")
    before = said.inner_text()
    page.keyboard.press("ArrowRight")
    expect(said).not_to_have_text(before)
    expect(focus).to_have_attribute("aria-valuetext", said.inner_text())
    tab_to(page, '[data-algorithm="0"]')
    expect(focus).to_have_css("outline-style", "solid")
    page.keyboard.press("Space")
    expect(page.locator('#curve-chart [data-run="0"]')).to_have_count(0)
    tab_to(page, "[data-client]")
    expect(page.locator(":focus + span")).to_have_css("outline-style", "solid")


def test_the_pointer_reads_values_off_the_chart(page):
    chart = page.locator("#curve-chart svg")
    box = chart.bounding_box()
    readings = []
    for share in (0.3, 0.9):
        chart.hover(position={"x": share * box["width"], "y": box["height"] / 2})
        readings.append(float(page.locator("#radius-text").inner_text().rstrip("°")))
    assert 4 < readings[0] < 6
    assert 15 < readings[1] < 17


def test_the_unit_can_be_changed_everywhere(page):
    expect(page.locator("#curve-chart svg")).to_contain_text("degrees")
    page.get_by_label("radians", exact=True).check()
    expect(page.locator("#curve-chart svg")).to_contain_text("radius in radians")
    expect(page.locator("#acr-chart svg")).to_contain_text("radius in radians")
    expect(page.locator("#radius-text")).to_contain_text(" radians")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
@pytest.mark.parametrize("which", ["report", "hostile"])
def test_nothing_is_wider_than_the_window(windows, request, width, which):
    page = windows(request.getfixturevalue(which), width)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, .chips')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.evaluate(outside) == []


def test_charts_fit_again_when_the_window_changes(page):
    page.set_viewport_size({"width": 375, "height": 900})
    wait_until(page, "document.querySelector('#curve-chart svg').viewBox.baseVal.width <= 375")
    expect(page.locator("#curve-chart path.mean")).to_have_count(len(REGIMES))


def test_light_and_dark_follow_the_reader(page):
    contrast = (
        "(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).map(Number)"
        ".reduce((a, b) => a + b)))(getComputedStyle(document.body))"
    )
    line = "getComputedStyle(document.querySelector('#curve-chart path.mean')).stroke"
    paper, ink = page.evaluate(contrast)
    assert paper > 600 > 150 > ink
    light = page.evaluate(line)
    page.emulate_media(color_scheme="dark")
    paper, ink = page.evaluate(contrast)
    assert paper < 150 < 600 < ink
    assert page.evaluate(line) != light


def test_hostile_names_stay_text(windows, hostile):
    page = windows(hostile)
    expect(page).to_have_title(HOSTILE)
    expect(page.locator("#curves .algorithm span").first).to_contain_text(HOSTILE)
    expect(page.locator("#curve-chart path.mean")).to_have_count(2)


def test_without_scripts_the_pictures_are_there(windows, report):
    page = windows(report, scripts=False)
    pictures = page.locator("img.fallback")
    expect(pictures).to_have_count(2)
    assert min(pictures.evaluate_all("all => all.map(image => image.naturalWidth)")) > 300
    expect(page.locator(".controls")).to_be_hidden()


def _recommended(page: Page) -> list[list[str]]:
    cells = "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    return page.locator("#recommendation-table tbody tr").evaluate_all(cells)


def test_the_recommendation_at_no_accuracy_is_the_one_written_down(page):
    accepted, groups = page.locator("#accepted"), page.locator("#recommendations")
    written = _recommended(page), groups.inner_text()
    accepted.fill("100")
    assert (_recommended(page), groups.inner_text()) != written
    accepted.fill("0")
    assert (_recommended(page), groups.inner_text()) == written


@pytest.mark.parametrize("least", [60, 85, 95])
def test_an_accepted_accuracy_rules_regimes_out(page, report, least):
    page.locator("#accepted").fill(str(least))
    data = data_of(report)
    labels = [run["label"] for run in data["runs"]]
    for cells, client in zip(_recommended(page), data["recommendation"]["clients"], strict=True):
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


def test_the_keyboard_says_which_accuracy_is_accepted(page):
    tab_to(page, "#accepted")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#accepted-text")).to_have_text("3 %")
    expect(page.locator(":focus")).to_have_attribute("aria-valuetext", "3 %")


def test_radii_as_a_share_of_sigma_and_accuracies_as_shares(page, report):
    page.locator('[data-unit="2"]').check()
    expect(page.locator("#curve-chart svg")).to_contain_text("radius in % of σ")
    radius, value = page.locator("#radius"), page.locator("#readout b").first
    radius.fill(str(len(data_of(report)["radii"]) - 1))
    share = float(page.locator("#radius-text").inner_text().split()[0])
    assert share == pytest.approx(100, rel=0.02)
    radius.fill("0")
    percents = float(value.inner_text().split()[0])
    page.locator('[data-accuracy="1"]').check()
    assert float(value.inner_text()) == pytest.approx(percents / 100)
    expect(page.locator("#curve-chart svg")).not_to_contain_text("80 %")


def _says(page: Page, run: int) -> Locator:
    return page.locator(f'[data-explored="{run}"] .explored-answer')


def _pick(page: Page, number: int) -> None:
    page.locator("#pictures input").nth(number).check()


def test_the_explorer_shows_the_picture_of_the_step(page):
    for step in (15, 4, 30):
        page.locator("#step").fill(str(step))
        gray = 8 * step  # as the made-up strip has it
        wait_until(
            page,
            "gray => { const pen = new OffscreenCanvas(1, 1).getContext('2d');"
            " pen.drawImage(document.getElementById('picture'), 9, 9, 1, 1, 0, 0, 1, 1);"
            " return pen.getImageData(0, 0, 1, 1).data[0] === gray; }",
            gray,
        )


def test_the_explorer_says_whether_the_step_is_certified(page, report):
    image = next(i for i in data_of(report)["explorer"]["images"] if len(i["runs"]) == 3)
    _pick(page, 0)
    for step in (15, 17, 21, 0):
        page.locator("#step").fill(str(step))
        for seen in image["runs"]:
            said, walk = _says(page, seen["run"]).inner_text(), seen["sweeps"][0]
            if seen["ends"] is None:
                assert "nothing is certified" in said
                continue
            inside = walk["inside"][step] == "1"
            assert ("inside" if inside else "outside") + " the certified range" in said
            label = walk["winners"][step][0][0]
            assert f"class {label}, 80 of 100 votes" in said
            kept = label == seen["predicted"]
            assert step == 15 or ("still the same class" if kept else "another class") in said
            assert ("correct" if label == image["label"] else "wrong") in said


def test_the_keyboard_picks_an_image_and_deforms_it(page):
    words = page.locator("#picture-words")
    tab_to(page, '#pictures input[name="picture"]')
    before = words.inner_text()
    page.keyboard.press("ArrowRight")
    expect(words).not_to_have_text(before)
    tab_to(page, "#step")
    page.keyboard.press("ArrowRight")
    spoken = page.locator(":focus").get_attribute("aria-valuetext")
    assert spoken.startswith("2.4° counter-clockwise. ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#step-text")).to_have_text("2.4° clockwise")


def test_a_click_on_a_strip_takes_the_reader_there(page):
    strip = page.locator(".explored-row:not([hidden]) .strip svg").first
    strip.click(position={"x": strip.bounding_box()["width"] - 10, "y": 5})
    expect(page.locator("#step")).to_have_value("30")


def test_only_regimes_that_explored_an_image_speak_of_it(page, report):
    for number, image in enumerate(data_of(report)["explorer"]["images"]):
        _pick(page, number)
        runs = "all => all.map(row => Number(row.dataset.explored))"
        visible = page.locator("[data-explored]:visible").evaluate_all(runs)
        assert visible == [seen["run"] for seen in image["runs"]]


def test_the_certified_range_is_drawn_to_scale(page, report):
    _pick(page, 0)
    image = data_of(report)["explorer"]["images"][0]
    for seen in image["runs"]:
        bar = page.locator(f'[data-explored="{seen["run"]}"] .strip .certified')
        if seen["ends"] is None:
            expect(bar).to_have_count(0)
            continue
        x, width = (float(bar.get_attribute(name)) for name in ("x", "width"))
        whole = bar.evaluate("b => b.ownerSVGElement.viewBox.baseVal.width")
        values = image["sweeps"][0]["values"]
        wide = (whole - 20) * (seen["ends"][1] - seen["ends"][0]) / (values[-1] - values[0])
        assert width == pytest.approx(max(2, wide), abs=0.5)
        assert x + width / 2 == pytest.approx(whole / 2, abs=0.5)
