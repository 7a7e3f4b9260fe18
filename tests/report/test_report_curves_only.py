"""Runs whose clients share curves and keep their certificates: one page, and what is verified."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import claims_factory
import tiny_study as tiny
from certifl.certification import Certificates
from certifl.errors import StoreMismatch
from certifl.experiments.run import Options
from certifl.experiments.run import run as run_study
from certifl.experiments.verify import impossible, verify_run
from certifl.paper.claims import check_claims, verdicts_section
from certifl.report import load_runs, summary_rows, write_report
from certifl.report.compare import compare
from certifl.report.seed_table import seed_table
from certifl.report.summary import client_acr, client_curves, radius_grid
from certifl.runs.folder import RunFolder
from report_factory import keep_to_themselves, make_certificates, make_manifest, write_run
from report_pages import data_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two regimes of which curves are known, and one with all certificates."""
    place, folders = tmp_path_factory.mktemp("curves"), []
    for number, regime in enumerate(("local", "fedavg", "ditto")):
        certificates = make_certificates(0.6 + 0.15 * number, 3, 20, seed=number)
        manifest = make_manifest(regime, regime.capitalize(), 3, 60)
        folder = write_run(place / regime, certificates, manifest)
        folders.append(folder if number == 2 else keep_to_themselves(folder, certificates))
    return folders


@pytest.mark.parametrize("chosen", [slice(0, 2), slice(0, 3)])
def test_curves_stand_on_one_page_and_nothing_is_paired(bare, runs, chosen, tmp_path):
    loaded = load_runs(runs[chosen])
    page = write_report(
        runs[chosen], tmp_path / "report.html", figures=False, claims=verdicts_section
    )
    data, words = data_of(page), re.sub(r"\s+", " ", page.read_text())
    grid = radius_grid(loaded)
    for run, shown in zip(loaded, data["runs"], strict=True):
        assert shown["curves"] == client_curves(run, grid).round(5).tolist()
        assert shown["acr"] == pytest.approx(client_acr(run).tolist())
    assert data["recommendation"] is None
    assert 'id="recommendation"' not in words
    assert "is ahead" not in words
    assert "no difference shown" not in words
    assert "no interval of a difference, no recommendation" in words
    assert "for each radius of a fixed grid" in words
    assert "has the largest average certified radius of these runs" in words


def test_numbers_of_such_a_comparison_are_those_of_the_curves(runs):
    loaded = load_runs(runs)
    found = compare(loaded)
    assert not found.paired
    assert found.acr == pytest.approx([client_acr(run).mean() for run in loaded])
    for (one, other), pair in found.pairs.items():
        assert pair.estimate == pytest.approx(found.acr[one] - found.acr[other])
        assert not pair.shown
    assert found.clients == ()
    assert compare(loaded[:1]).paired  # a run by itself has its interval, as before


def test_a_table_without_pairs_has_no_differences(runs):
    table = seed_table(runs)
    assert "inf" not in table.text() + table.csv()
    assert {row["behind"] for row in table.numbers} == {None}


def test_the_table_of_the_terminal_has_every_run(runs):
    rows = summary_rows(runs)
    assert [row["abstained"] is None for row in rows] == [True, True, False]


def test_claims_are_never_tested_on_rows_made_from_curves(tmp_path):
    spec = claims_factory.spec(claims_factory.FEDAVG)
    made = claims_factory.results(spec, 0.7)
    folder = write_run(tmp_path / "runs" / "a", made.certificates, made.manifest, spec=made.spec)
    keep_to_themselves(folder, made.certificates)
    with pytest.raises(StoreMismatch, match="image by image"):
        check_claims([folder])
    found = check_claims([tmp_path])
    assert any("share curves only" in note for note in found.notes)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kept") / "run"
    study = tiny.spec()
    folder = run_study(study, Options(place, explore=False))
    certificates = folder.load_certificates()
    shutil.copy(folder.certificates, place.parent / "own.parquet")
    estimator = study.certification.settings().estimator_for(study.perturbation())
    return keep_to_themselves(place, certificates, estimator.grid())


def test_verify_says_what_it_can_and_where_the_rest_is_done(kept):
    found = verify_run(kept)
    assert (found.checked, found.problems) == (0, ())
    answer = tiny.cli("verify", kept)
    said = re.sub(r"\s+", " ", answer.err)
    assert answer.code == 2
    assert "follow from their votes" not in answer.out
    assert "holds no certificates to verify" in said
    assert "kept votes and radii of their images" in said
    assert "2 curves agree with the spec and are possible" in said
    assert "does not make them true" in said
    assert "repeat the command" not in said.lower()
    tiny.cli("verify", kept.parent / "own.parquet").fine("12 certificates follow")


def test_what_needs_single_images_says_where_they_are(kept):
    for command in ("attack", "explore"):
        tiny.cli(command, kept).refused("its clients certified on their own machines")


def test_rows_of_single_clients_are_verified_from_their_votes(kept, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(kept, place)
    own = Certificates.load(kept.parent / "own.parquet").of_client(1)
    path = RunFolder(place).votes(1).with_name("rows-00001.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    own.save(path)
    assert verify_run(place).checked == 6
    answer = tiny.cli("verify", place)
    assert "6 certificates follow from their votes" in answer.out
    assert answer.code == 2


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["correct"].__setitem__(9, 100), "must fall"),
        (lambda c: c.update(acr=c["acr"] + 1.0), "does not fit its curve"),
        (lambda c: c.update(acr=-0.1), "does not fit its curve"),
        (lambda c: c.update(images=7), "the spec certifies 6"),
        (lambda c: c.update(correct=[1]), "1 counts for 50 radii"),
        (
            lambda c: c.update(acr=2 * c["acr"], radii=[2 * r for r in c["radii"]]),
            "its radii are not those that the spec gives",
        ),
        (
            lambda c: c.update(acr=1000.0, correct=[6] * len(c["radii"])),
            "an average certified radius of 1000 is beyond",
        ),
        (lambda c: c.update(images=0), "is of 0 images"),
        (lambda c: c.update(radii=["x"]), "damaged"),
        (lambda c: c["conditions"].update(alpha=0.5), "say alpha = 0.5, the spec 0.001"),
        (lambda c: c["conditions"].pop("description"), "what it certified is damaged"),
    ],
)
def test_an_impossible_curve_is_a_problem(kept, tmp_path, change, says):
    place = tmp_path / "run"
    shutil.copytree(kept, place)
    shared = json.loads((place / "curves.json").read_text())
    change(shared["clients"]["1"])
    (place / "curves.json").write_text(json.dumps(shared))
    assert any(says in problem for problem in verify_run(place).problems)
    assert tiny.cli("verify", place).code == 1


def test_every_true_curve_is_possible():
    for seed in range(20):
        certificates = make_certificates(0.3 + 0.03 * seed, 1, 17, seed=seed)
        radii = np.linspace(0.0, 0.2, 9)
        counts = [int((certificates.correct & (certificates.radius >= r)).sum()) for r in radii]
        acr = certificates.average_certified_radius()
        curve = {"radii": radii.tolist(), "correct": counts, "images": 17, "acr": acr}
        spec = tiny.spec("certification.images=17")
        assert impossible(0, curve, spec) == []
