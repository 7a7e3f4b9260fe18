"""`certifl attack` on a run: its record, its report, and a planted false certificate."""

import dataclasses
import json
import math

import numpy as np
import pytest

import tiny_study as tiny
from certifl.errors import InputError, StoreMismatch
from certifl.experiments import attack as attacking
from certifl.experiments.attack import Options, attack_run
from certifl.report import write_report
from certifl.runs.folder import RunFolder
from tiny_study import cli

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def few_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to see each number in its place; how much a verdict takes is tested elsewhere."""
    monkeypatch.setattr(attacking, "VOTES", 200)


def test_a_run_is_attacked_and_the_report_shows_it(copied):
    certificates = RunFolder(copied).load_certificates()
    done = cli("attack", copied, "--images", "3", "--directions", "8")
    done.fine("class changes inside certificates 0 of", "deformed first, worst of 8")
    held = json.loads((copied / "attack.json").read_text())
    inside, beyond = held["parameters"], held["deformed_first"]
    assert inside["violations"] == []
    assert inside["confirm"] == 10 * tiny.VALUES["certification"]["n"]
    assert inside["deltas"] == inside["images"] * (8 + 3 * 8)
    assert beyond["images"] == 6
    assert beyond["worst"] <= beyond["random"] <= 1
    assert 0 <= beyond["changed"] <= beyond["promised"] == inside["images"] <= 6
    assert [row["client"] for row in held["clients"]] == [0, 1]
    weighted = [row["clean"] * row["images"] for row in held["clients"]]
    assert beyond["clean"] == pytest.approx(sum(weighted) / 6)
    closest = inside["smallest_lead"]
    row = (certificates.client == closest["client"]) & (certificates.index == closest["index"])
    assert closest["length"] <= closest["radius"] == certificates.radius[row][0]
    assert len(closest["delta"]) == 1
    page = (copied / "report.html").read_text()
    assert "Under attack" in page
    assert f"0 of {inside['images']}" in page


def test_one_client_and_the_same_result_again(copied):
    options = Options(images=1, client=1, directions=2)
    first, second = attack_run(copied, options), attack_run(copied, options)
    for result in (first, second):
        result.pop("created")
        result.pop("seconds")
    assert first == second
    assert [row["client"] for row in first["clients"]] == [1]


def test_a_false_certificate_in_a_run_makes_the_command_fail(copied):
    folder = RunFolder(copied)
    made = folder.load_certificates()
    # Nobody reads digits turned by half a circle: with such a radius some class must change.
    planted = dataclasses.replace(made, radius=np.where(made.abstained, 0.0, math.pi))
    planted.save(folder.certificates)
    done = cli("attack", copied, "--images", "2", "--directions", "4")
    assert done.code == 1
    assert "WRONG" in done.out
    cases = json.loads(folder.attack.read_text())["parameters"]["violations"]
    assert cases
    assert all(case["rival"] != case["predicted"] for case in cases)
    assert all(case["p_value"] < 1e-6 for case in cases)
    assert "These certificates are wrong" in folder.report.read_text()


def test_what_cannot_be_attacked(copied, tmp_path):
    cli("attack", tmp_path / "nothing").refused("not a run folder")
    cli("attack", copied, "--client", "7").refused("--client 7", "0 to 1")
    folder = RunFolder(copied)
    made = folder.load_certificates()
    other = {**made.conditions, "model_fingerprint": {"0": "x", "1": "y"}}
    dataclasses.replace(made, conditions=other).save(folder.certificates)
    with pytest.raises(StoreMismatch, match="not the one that was certified"):
        attack_run(copied, Options(images=1))
    other = {**made.conditions, "data_fingerprint": "x"}
    dataclasses.replace(made, conditions=other).save(folder.certificates)
    with pytest.raises(StoreMismatch, match="other images than were certified"):
        attack_run(copied, Options(images=1))
    with pytest.raises(InputError, match="at least 1 image"):
        attack_run(copied, Options(images=0))
    assert not folder.attack.exists()


def test_an_old_or_damaged_record_is_not_shown(copied):
    attack_run(copied, Options(images=1, directions=2))
    path = copied / "attack.json"
    held = json.loads(path.read_text())
    page = copied / "report.html"
    for changed in ({**held, "spec_hash": "another"}, {**held, "format": 99}):
        path.write_text(json.dumps(changed))
        write_report([copied], page, figures=False)
        assert "Under attack" not in page.read_text()
    path.write_text(json.dumps({**held, "parameters": {}}))
    cli("report", copied).refused("attack.json", "damaged", code=1)
