"""axe finds nothing to complain of on any kind of page, in any color scheme and width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

import claims_factory as claims
from certifl.certification.certificates import Certificates
from certifl.paper.claims import verdicts_section
from certifl.paper.pages import write_paper_figure
from certifl.report import write_report
from explorer_factory import write_explorer
from report_factory import keep_to_themselves, write_study
from report_pages import hostile_page, own_page, shifted_runs

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
OPTIONS = {"runOnly": RULES, "resultTypes": ["violations"]}

PRIVACY = {
    "kind": "client",
    "epsilon_sent": [3.0],
    "epsilon": [3.0],
    "delta": 1e-5,
    "noise_multiplier": [1.1],
    "max_norm": 1.0,
    "noise_key": "seed",
}


def single(place: Path) -> Path:
    """One run, trained with privacy."""
    (run,) = write_study(place, {"local": ("Local", 0.6)}, clients=3, images=4)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "privacy": PRIVACY}))
    return write_report([run], place / "report.html", figures=False)


def several(place: Path) -> Path:
    """As many regimes as there are colors, some of them with explored images."""
    regimes = {f"regime{number}": (f"Regime {number}", 0.6 + 0.04 * number) for number in range(8)}
    runs = write_study(place, regimes, clients=3, images=4)
    for run in runs[:3]:
        write_explorer(run, [0, 5])
    return write_report(runs, place / "report.html", figures=False, claims=verdicts_section)


def of_shifts(place: Path) -> Path:
    return write_report(shifted_runs(place), place / "report.html", figures=False)


def with_claims(place: Path) -> Path:
    """Claims that are supported and undecided; those of a figure, below, are not supported."""
    specs = ((claims.FEDAVG, 0.7), (claims.LOCAL, 0.4))
    runs = [claims.results(claims.spec(algorithm), acr) for algorithm, acr in specs]
    return write_report(runs, place / "report.html", figures=False, claims=verdicts_section)


def curves_only(place: Path) -> Path:
    folders = write_study(place, clients=3, images=4)
    for folder in folders[:2]:
        keep_to_themselves(folder, Certificates.load(folder / "certificates.parquet"))
    return write_report(folders, place / "report.html", figures=False)


def of_a_figure(place: Path) -> Path:
    """What `certifl reproduce` writes around the pages of its comparisons."""
    curves = []
    for algorithm, acr in ((claims.FEDAVG, 0.4), (claims.LOCAL, 0.7)):
        folder = claims.write(place, claims.run(claims.spec(algorithm), acr))
        curves.append({"run": str(folder), "label": algorithm["name"]})
    panel = {"kind": "curves", "row": 0, "column": 0, "curves": curves}
    pages = [{"name": "one", "runs": curves}]
    index = {"figure": "figure1", "title": "Regimes", "panels": [panel], "pages": pages}
    (place / "figure.json").write_text(json.dumps(index))
    return write_paper_figure(place)


KINDS: tuple[Callable[[Path], Path], ...] = (
    single,
    several,
    of_shifts,
    with_claims,
    curves_only,
    of_a_figure,
    own_page,
    hostile_page,
)


NO_CONTRAST = {**OPTIONS, "rules": {"color-contrast": {"enabled": False}}}


def faults(page: Page, schemes: tuple[str, ...], options: dict[str, Any] = OPTIONS) -> list[str]:
    """What axe finds in some color schemes, one line for each element."""
    lines = []
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        for rule in Axe().run(page, options=options).response["violations"]:
            lines += [f"{scheme}, {rule['help']}: {node['html']}" for node in rule["nodes"]]
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_violation(windows, tmp_path, kind):
    """Colors are tested at one width: they are the same at all, and take most of the time."""
    report = kind(tmp_path)
    for width, schemes, options in (
        (1280, ("light", "dark"), OPTIONS),
        (375, ("light",), NO_CONTRAST),
    ):
        page = windows(report, width)
        for tab in page.get_by_role("tab").all() or [page.locator("h1")]:
            tab.click()
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert faults(page, schemes, options) == []
            # Each box is unchecked or checked now, and the last of the alternatives chosen.
            page.evaluate("document.querySelectorAll('input').forEach(box => box.click())")
            assert faults(page, schemes[:1], options) == []


def test_axe_would_find_a_planted_fault(windows, tmp_path):
    page = windows(single(tmp_path))
    page.evaluate("document.querySelector('label[for=radius]').remove()")
    page.evaluate("document.querySelector('h1').style.color = 'silver'")
    found = "\n".join(faults(page, ("light",)))
    assert 'id="radius"' in found
    assert "<h1" in found


def test_regions_have_names_and_the_page_one_heading(windows, tmp_path):
    page = windows(several(tmp_path))
    expect(page.locator("[role=region]:not([aria-label])")).to_have_count(0)
    expect(page.locator("h1")).to_have_count(1)
