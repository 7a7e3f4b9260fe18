"""The report page: true words, nothing from outside, and a real browser that can use all of it."""

import base64
import hashlib
import html
import html.parser
import json
import math
import re
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import claims_factory
from certifl.errors import StoreError, StoreMismatch
from certifl.paper.claims import claim_rows, verdicts_section
from certifl.paper.claims.catalogue import check_runs
from certifl.paper.claims.runs import read_run
from certifl.report import load_runs, page_beside, write_report
from certifl.report.compare import compare
from certifl.report.page import explorer as explored
from certifl.report.page import page as page_module
from certifl.report.page.html import Markup, el, embedded_json, table
from certifl.report.results import by_seed
from certifl.report.style import LOOKS
from certifl.report.summary import client_curves, group_words, radius_grid
from certifl.report.wording import percent
from explorer_factory import strip, write_explorer
from report_factory import PIXEL, ROTATION, make_certificates, make_manifest, write_run
from report_pages import data_of


@pytest.fixture
def page(study_report: Path) -> Path:
    return study_report


def test_the_page_is_one_small_file(page):
    assert page.stat().st_size < 1_000_000
    assert [path.name for path in page.parent.iterdir()] == [page.name]


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]


def test_the_page_names_nothing_outside_itself_and_does_not_move(page, hostile):
    for file in (page, hostile):
        text = file.read_text()
        links = _Links()
        links.feed(text)
        assert all(link.startswith(("data:", "#")) for link in links.found)
        style = re.findall(r"<style>(.*?)</style>", text, re.S)[0]
        assert "url(" not in style
        assert not re.search(r"@import|animation|transition|scroll-behavior", style)
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
    assert links.tags.count("img") == 2
    assert links.tags.count("noscript") == 3


def test_equal_results_give_an_equal_page(study, page, tmp_path):
    again = tmp_path / "again.html"
    write_report(study, again, title="Handwritten digits", figures=False, claims=verdicts_section)
    assert again.read_bytes() == page.read_bytes()


def test_the_numbers_in_the_page_are_the_stored_ones(study, page):
    data = data_of(page)
    runs = load_runs(study)
    radii = radius_grid(runs)
    assert data["radii"] == radii.tolist()
    for shown, run in zip(data["runs"], runs, strict=True):
        assert shown["label"] == run.label
        assert shown["curves"] == client_curves(run, radii).round(5).tolist()


def test_the_page_says_what_was_found_and_what_it_means(page):
    text = _words(page)
    assert "FedAvg gives the largest average certified radius" in text
    assert "ahead of Personalized" in text
    assert "at least 99.9 % over the votes" in text
    assert "interpolated a second time" in text
    assert "The image is rotated about its center" in text
    assert "certifl verify" in text
    assert "12.3 s" in text
    assert "stay below σ (Corollary 1)" in text


def _words(page: Path) -> str:
    body = re.sub(r"<(script|style|noscript).*?</\1>", " ", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def written(runs: Sequence[Any], folder: Path) -> Path:
    return write_report(runs, folder / "report.html", figures=False, claims=verdicts_section)


def test_one_run_has_a_page_without_comparison(bare, study, tmp_path):
    text = _words(written(study[:1], tmp_path))
    assert "Local certifies" in text
    assert "Which algorithm" not in text
    assert "Differences between" not in text


def test_runs_that_differ_in_more_than_the_algorithm_are_marked(bare, tmp_path):
    folders = []
    for number in range(2):
        certificates = make_certificates(0.8, 2, 12, seed=number)
        conditions = {**certificates.conditions, "alpha": 0.001 * (1 + number)}
        object.__setattr__(certificates, "conditions", conditions)
        manifest = make_manifest("fedavg", f"FedAvg {number}", 2, 24)
        folders.append(write_run(tmp_path / str(number), certificates, manifest))
    text = _words(written(folders, tmp_path))
    assert "differ in more than the algorithm: alpha (0.001, 0.002)" in text
    assert "at least 99.8 % over the votes" in text


def test_every_sigma_is_named_and_no_risk_is_rounded_away(bare, tmp_path):
    folders = []
    for number in range(2):
        wide = {**ROTATION, "sigma": 0.1 * (1 + number) * math.pi}
        certificates = make_certificates(0.8, 2, 12, wide)
        conditions = {**certificates.conditions, "alpha": 1e-8}
        object.__setattr__(certificates, "conditions", conditions)
        manifest = make_manifest("fedavg", f"FedAvg {number}", 2, 24)
        folders.append(write_run(tmp_path / str(number), certificates, manifest))
    text = _words(written(folders, tmp_path))
    both = "σ = 18° (0.1 π radians) or 36° (0.2 π radians)"
    assert both in text
    assert both in group_words(*by_seed(load_runs(folders)))  # titles of figures
    assert "at least 99.999999 % over the votes" in text


def test_radii_of_one_side_are_called_that_on_every_axis(bare, tmp_path):
    blur = {"family": "gaussian_blur", "law": "exponential", "norm": "l1", "unit": "px^2"}
    certificates = make_certificates(0.8, 2, 12, {**PIXEL, **blur})
    folder = write_run(tmp_path / "run", certificates, make_manifest("fedavg", "FedAvg", 2, 24))
    page = written([folder], tmp_path)
    (unit, _) = data_of(page)["units"]
    assert unit["axis"] == ", added variance from 0, in px^2"
    assert page.read_text().count("radius${unit.axis}") == 2


def test_a_page_has_a_default_path(study):
    assert page_beside(study[:1]) == study[0] / "report.html"
    assert page_beside(study[:2]) == study[0].parent / "comparison-local-fedavg" / "report.html"
    many = [study[0].parent / f"{'long' * 5}{number}" for number in range(9)]
    assert re.fullmatch(r"comparison-9-runs-[0-9a-f]{8}", page_beside(many).parent.name)


def test_a_missing_run_leaves_no_page(tmp_path):
    with pytest.raises(StoreMismatch):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_accuracies_of_the_recommendation_are_those_of_the_images(study, page):
    shown, runs = data_of(page)["recommendation"], load_runs(study)
    assert shown["local"] == 0
    for client in shown["clients"]:
        for run, (value, low, high, text) in zip(runs, client["accuracy"], strict=True):
            own = run.certificates.of_client(client["client"])
            assert value == own.correct.mean()
            assert low < value < high or value in (low, high)
            assert text.startswith(percent(value))


def test_pairs_of_the_recommendation_are_those_of_the_comparison(study, page):
    found = compare(load_runs(study))
    for client, part in zip(
        data_of(page)["recommendation"]["clients"], found.clients, strict=True
    ):
        assert len(client["pairs"]) == 6
        for name, (_, shown) in client["pairs"].items():
            ahead, behind = map(int, name.split("-"))
            assert part.acr[ahead] >= part.acr[behind]
            assert bool(shown) == part.pairs[min(ahead, behind), max(ahead, behind)].shown


def test_claims_are_on_the_page_with_effect_interval_and_verdict(bare, tmp_path):
    better = claims_factory.results(claims_factory.spec(claims_factory.FEDAVG), 0.7)
    worse = claims_factory.results(claims_factory.spec(claims_factory.LOCAL), 0.4)
    text = _words(written([worse, better], tmp_path))
    (row,) = [
        row
        for row in claim_rows(check_runs([read_run(r) for r in (worse, better)]))
        if row["claim"] == "4.1 (ii)"
    ]
    assert row["verdict"] == "supported"
    shown = f"✓ supported Section 4.1 (ii) {row['sentence']} {row['effect']} points"
    assert f"{shown} 95 %: {row['interval']}" in text
    assert "Rule supported if the whole interval lies above 0" in text
    assert "Section A.2" not in text  # nothing here has a hundred clients


def test_runs_that_no_claim_is_about_have_no_claims(bare, tmp_path):
    same = claims_factory.spec(claims_factory.FEDAVG, federated="none")
    runs = [claims_factory.results({**same, "seed": 0}, acr) for acr in (0.4, 0.7)]
    text = _words(written(runs, tmp_path))
    assert "paper’s claims" not in text


def test_explored_images_are_compared_with_their_certificates(study, page):
    explorer, runs = data_of(page)["explorer"], load_runs(study)
    shared = [image for image in explorer["images"] if len(image["runs"]) == 3]
    assert [(image["client"], image["index"]) for image in shared] == [(0, 0), (1, 45)]
    for image in explorer["images"]:
        values = np.array(image["sweeps"][0]["values"])
        for seen in image["runs"]:
            own = runs[seen["run"]].certificates
            (row,) = np.flatnonzero(
                (own.index == image["index"]) & (own.client == image["client"])
            )
            certified = ~own.abstained[row] & (np.abs(values) <= own.radius[row])
            flags = "".join("1" if inside else "0" for inside in certified)
            assert seen["sweeps"][0]["inside"] == flags
            assert (seen["ends"] is None) == bool(own.abstained[row])


def test_too_close_to_call_is_a_sign_test():
    votes = [[[3, 80], [1, 20]], [[3, 55], [1, 45]], [[3, 100]]]
    walk = {"values": [-1, 0, 1], "lengths": [1, 0, 1], "winners": votes}
    assert explored._sweep(walk, 0.5, (-0.5, 0.5))["close"] == "010"
    assert explored._sweep(walk, 0.5, (-0.5, 0.5))["inside"] == "010"
    assert explored._sweep(walk, 0.5, (-0.5, 2.0))["inside"] == "011"
    assert explored._sweep(walk, 0.0, None)["inside"] == "000"


def test_another_runs_exploration_is_not_shown(bare, study, tmp_path):
    place = tmp_path / "local"
    shutil.copytree(study[0], place)
    write_explorer(place, [0], spec_hash="another")
    assert data_of(write_report([place], tmp_path / "a.html", figures=False))["explorer"] is None
    write_explorer(place, [], skipped="It would have taken too long.")
    assert "It would have taken too long." in _words(
        write_report([place], tmp_path / "b.html", figures=False)
    )
    write_explorer(place, [0], walks=[])
    (place / "explorer.json").write_text(
        (place / "explorer.json").read_text().replace("tile", "x")
    )
    with pytest.raises(StoreError, match="certifl explore"):
        write_report([place], tmp_path / "c.html", figures=False)


def test_records_of_0_1_0_are_shown_without_their_planes(bare, shifted, tmp_path):
    run, page = Path(shutil.copytree(shifted[0], tmp_path / "run")), tmp_path / "report.html"
    shown = data_of(write_report([run], page, figures=False))["explorer"]
    assert [len(image["sweeps"]) for image in shown["images"]] == [2, 2, 2]
    path = run / "explorer.json"
    record = json.loads(path.read_text())
    plane = {"values": [-0.6, 0.0, 0.6], "lengths": [], "winners": [], "picture": ""}
    for image in record["images"]:
        image["plane"] = plane
    path.write_text(json.dumps({**record, "format": 3, "plane_votes": 100}))
    assert data_of(write_report([run], page, figures=False))["explorer"] == shown
    path.write_text(json.dumps({**record, "format": 2}))
    assert data_of(write_report([run], page, figures=False))["explorer"] is None


def test_a_page_takes_no_more_pictures_than_it_may(bare, study, tmp_path, monkeypatch):
    size = len(strip(range(31)))
    monkeypatch.setattr(page_module, "MOST_PICTURES", 2 * size)
    page = written(study, tmp_path)
    images = data_of(page)["explorer"]["images"]
    assert [len(image["runs"]) for image in images] == [3, 3]


def test_markup_escapes_whatever_is_not_markup():
    assert el("p", {"title": '"<'}, "<b>&") == '<p title="&quot;&lt;">&lt;b&gt;&amp;</p>'
    assert el("p", None, el("b", None, "x")) == "<p><b>x</b></p>"
    assert isinstance(table("c", ["<h>"], [["<r>", Markup("<i></i>")]]), Markup)
    assert "<h>" not in table("c", ["<h>"], [["<r>"]])
    sealed = embedded_json("x", "</script><!--")
    assert sealed.count("<") == 2


def test_every_image_is_shown_under_every_run_that_is_named(bare, study, tmp_path):
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in study]
    for number, run in enumerate(runs):
        write_explorer(run, [0, 45, 90 + number])
    write_explorer(runs[2], [130])
    page = written(runs, tmp_path)
    explorer = data_of(page)["explorer"]
    named = {int(place) for place in explorer["votes"]}
    assert named == {0, 1, 3}
    assert len(explorer["images"]) == 2
    assert all({run["run"] for run in image["runs"]} == named for image in explorer["images"])
    assert re.findall(r'data-explored="(\d)"', page.read_text()) == ["0", "1", "3"]
    assert "which explored other images or none" in page.read_text()


def test_no_series_has_the_color_of_too_close_to_call():
    style = files("certifl.report").joinpath("assets", "page.css").read_text()
    shades = re.findall(r"\.s\d \{ --c: (#\w{6});", style) + [look.color for look in LOOKS]
    assert len(shades) == 3 * len(LOOKS)
    for shade in shades:
        parts = [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
        assert max(parts) - min(parts) > 40  # what is undecided is gray


def test_numbers_stay_on_one_line_with_their_signs(page):
    shown = page.read_text().partition('id="report-data"')[0]
    assert "95\N{NO-BREAK SPACE}%" in shown
    assert not re.search(r"\d %", re.sub(r"<(style|code|pre).*?</\1>", "", shown, flags=re.S))
    assert str(el("p", None, "λ = 0.5")) == "<p>λ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.5</p>"
    assert str(el("code", None, "lambda = 0.5")) == "<code>lambda = 0.5</code>"
