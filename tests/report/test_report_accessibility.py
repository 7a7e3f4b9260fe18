"""axe finds nothing to complain of on any kind of page, in any color scheme and width."""

import json
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

import claims_factory as claims
from certifl.certification.certificates import Certificates
from certifl.paper import pages
from certifl.paper.pages import write_paper_figure
from certifl.report import write_report
from report_factory import keep_to_themselves, write_study
from report_pages import HOSTILE, own_runs

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("report accessibility")

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
OPTIONS = {"runOnly": RULES, "resultTypes": ["violations"]}
CONTRAST = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}
NO_CONTRAST = {**OPTIONS, "rules": {"color-contrast": {"enabled": False}}}

PRIVACY = {
    "kind": "client",
    "epsilon_messages": [3.0],
    "epsilon": None,
    "covers": HOSTILE,
    "delta": 1e-5,
    "noise_multiplier": [1.1],
    "max_norm": 1.0,
    "noise_key": "seed",
}


def everything(place: Path) -> Path:
    """Two perturbations, images explored along one and along two axes, privacy, odd names."""
    runs = own_runs(place)
    manifest = json.loads((runs[0] / "run.json").read_text()) | {"privacy": PRIVACY}
    manifest["label"] = manifest["deploys"] = manifest["command"] = HOSTILE
    manifest["data"]["class_names"] = [HOSTILE] * 10
    (runs[0] / "run.json").write_text(json.dumps(manifest))
    return write_report(runs, place / "report.html", figures=False)


def curves_only(place: Path) -> Path:
    regimes = {"local": ("Local", 0.6), "fedavg": ("FedAvg", 0.9)}
    (one, *_) = folders = write_study(place, regimes, clients=2, images=4)
    keep_to_themselves(one, Certificates.load(one / "certificates.parquet"))
    return write_report(folders, place / "report.html", figures=False)


def of_a_figure(place: Path) -> Path:
    """What `certifl reproduce` writes around its pages; claims with every kind of verdict."""
    curves = []
    for algorithm, acr in ((claims.FEDAVG, 0.7), (claims.LOCAL, 0.4), (claims.PERSONALIZED, 0.5)):
        folder = claims.write(place, claims.run(claims.spec(algorithm), acr))
        curves.append({"run": str(folder), "label": algorithm["name"]})
    panel = {"kind": "curves", "row": 0, "column": 0, "curves": curves}
    index = {"figure": "figure1", "title": "Regimes", "panels": [panel], "pages": []}
    (place / "figure.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "save", lambda *_: [])  # its files are not looked at
        page = write_paper_figure(place)
    assert all(f'"badge {kind}"' in page.read_text() for kind in ("supported", "refuted", "open"))
    return page


def faults(page: Page, options: dict[str, Any], part: str | None = None) -> list[str]:
    return [
        f"{rule['help']}: {node['html']}"
        for rule in Axe().run(page, part, options).response["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("kind", [everything, curves_only, of_a_figure])
def test_axe_finds_no_violation(windows, tmp_path, kind):
    """Contrast takes most of the time: it is tested where colors may differ."""
    report = kind(tmp_path)
    wide, narrow = windows(report), windows(report, 375)
    expect(wide.locator("h1")).to_have_count(1)
    expect(wide.locator("[role=region]:not([aria-label])")).to_have_count(0)
    for page in (wide, narrow):
        for number, tab in enumerate(page.get_by_role("tab").all() or [page.locator("h1")]):
            options = OPTIONS if page is wide and number == 0 else NO_CONTRAST
            tab.click()
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert faults(page, options) == []
            if page is narrow:
                continue
            # Each box is unchecked or checked now, and the last of the alternatives chosen.
            page.evaluate("document.querySelectorAll('input').forEach(box => box.click())")
            assert faults(page, NO_CONTRAST) == []
            if options is OPTIONS:
                page.emulate_media(color_scheme="dark")
                assert faults(page, CONTRAST) == []
                page.emulate_media(color_scheme="light")


def test_axe_would_find_a_planted_fault(windows, tmp_path):
    page = windows(curves_only(tmp_path))
    page.evaluate("document.querySelector('label[for=radius]').remove()")
    page.evaluate("document.querySelector('h1').style.color = 'silver'")
    found = "\n".join(faults(page, OPTIONS))
    assert 'id="radius"' in found
    assert "<h1" in found
    assert "<h1" in "\n".join(faults(page, CONTRAST, "header"))
    assert 'id="radius"' in "\n".join(faults(page, NO_CONTRAST, "#curves"))
