"""Pages that tests look at: a study with an explorer, and one made of files that misbehave."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from certifl.certification.certificates import Certificates
from certifl.paper.claims import verdicts_section
from certifl.report import write_report
from explorer_factory import write_explorer
from report_factory import (
    PIXEL,
    ROTATION,
    TRANSLATION,
    make_certificates,
    make_manifest,
    write_run,
    write_study,
)

CLIENTS = 4
HOSTILE = "<script>document.title='broken'</script>\"'&$x ${y} </noscript><img src=x>"


def without_drawings(patch: pytest.MonkeyPatch) -> None:
    """Pages lack the drawings for browsers without scripts, which take most of their time."""
    patch.setattr("certifl.report.page.html.image_bytes", lambda *_: b"<svg/>")


def study_runs(place: Path) -> list[Path]:
    folders = write_study(place, clients=CLIENTS)
    for number, folder in enumerate(folders[:-1]):
        write_explorer(folder, [0, 45, 90 + number])
    return folders


def shifted_runs(place: Path) -> list[Path]:
    """Three regimes that certify translations, explored on the same images along both axes."""
    folders = []
    for number, (regime, quality) in enumerate(
        (("local", 0.75), ("fedavg", 0.95), ("ditto", 0.9))
    ):
        certificates = make_certificates(quality, 3, 12, TRANSLATION, seed=number)
        manifest = make_manifest(regime, regime.capitalize(), 3, 36)
        folders.append(write_run(place / regime, certificates, manifest))
        write_explorer(folders[-1], [0, 12, 24])
    return folders


def study_page(runs: list[Path], place: Path) -> Path:
    page, title = place / "report.html", "Handwritten digits"
    return write_report(runs, page, title=title, figures=False, claims=verdicts_section)


def hostile_page(place: Path) -> Path:
    """A page made of files that try to get out of their place, with long names."""
    folders = []
    for number, quality in enumerate((0.6, 0.9)):
        manifest = make_manifest(f"regime{number}", f"{HOSTILE} {'long' * 30} {number}", 2, 24)
        manifest["data"]["name"] = manifest["deploys"] = manifest["command"] = HOSTILE
        manifest["data"]["class_names"] = [HOSTILE] * 10
        certificates = make_certificates(quality, 2, 12, {**PIXEL, "threat": HOSTILE}, seed=number)
        folder = place / f"run {number}"
        folders.append(write_run(folder, certificates, manifest, spec=f"# {HOSTILE}\n"))
        ways: dict[str, str] = dict.fromkeys(("name", "words", "forward", "backward"), HOSTILE)
        write_explorer(folder, [0, 13], ways)
    return write_report(
        folders, place / "report.html", title=HOSTILE, figures=False, claims=verdicts_section
    )


def two_perturbations(quality: float, seed: int) -> Certificates:
    """Clients 0 and 1 certify rotations, 2 and 3 translations."""
    parts = []
    for first, perturbation in ((0, ROTATION), (2, TRANSLATION)):
        made = make_certificates(quality, 2, 12, perturbation, seed=seed)
        client, index = made.client + first, made.index + 12 * first
        parts.append(dataclasses.replace(made, client=client, index=index))
    return Certificates.concatenate(parts)


def own_runs(place: Path) -> list[Path]:
    """Two regimes whose clients certify two perturbations, all explored."""
    folders = []
    for number, regime in enumerate(("local", "fedavg")):
        certificates = two_perturbations(0.7 + 0.2 * number, number)
        manifest = make_manifest(regime, regime.capitalize(), 4, 48)
        folders.append(write_run(place / regime, certificates, manifest))
        write_explorer(folders[-1], [0, 12, 24, 36])
    return folders


def own_page(place: Path) -> Path:
    """A page with a panel for each of two perturbations."""
    runs = own_runs(place)
    return write_report(runs, place / "report.html", figures=False, claims=verdicts_section)


def data_of(page: Path, at: int = 0) -> dict[str, Any]:
    pattern = r'<script type="application/json" id="report-data">(.*?)</script>'
    (found,) = re.findall(pattern, page.read_text(), re.S)
    return json.loads(found)["groups"][at]
