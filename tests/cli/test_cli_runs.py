"""Commands about a finished run: the same again, report, verify, damage of every kind."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from certifl.certification import Certificates
from certifl.experiments.run import Options, run


def test_the_same_command_again_returns_at_once_and_changes_nothing(finished):
    before = tiny.files(finished)
    again = tiny.cli("run", finished.parent / "tiny.toml", "--out", finished)
    again.fine("FedAvg", "ACR", "Report:")
    assert "training" not in again.err
    assert tiny.files(finished) == before


def test_another_spec_is_refused_and_changes_nothing(finished):
    before = tiny.files(finished)
    spec = finished.parent / "tiny.toml"
    other = tiny.cli("run", spec, "--out", finished, "--set", "seed=1")
    other.refused("another study", "--out", "--overwrite", "seed is 0 there and 1 here")
    several = ("--set", "training.lr=0.01", "--set", "certification.radii=['5deg']")
    found = tiny.cli("run", spec, "--out", finished, *several, "--set", "name=mine")
    found.refused(
        "training.lr is 0.05 there and 0.01 here", "certification.radii is not set there"
    )
    assert "name is" not in found.err
    assert tiny.files(finished) == before


def test_everything_is_on_record(finished):
    manifest = json.loads((finished / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["command"].startswith("certifl run ")
    assert {"torch", "certifl", "python"} <= set(manifest["versions"])
    assert manifest["data"]["image_size"] == [8, 8]
    for name in ("spec.toml", "partition.json", "history.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 0
    figures = {path.suffix for path in (finished / "figures").iterdir()}
    assert {".png", ".pdf"} <= figures
    assert not list(finished.rglob("*.tmp"))


@tiny.undrawn()
def test_a_lost_report_is_written_again_by_the_same_command(copied):
    (copied / "report.html").unlink()
    tiny.cli("run", copied.parent / "tiny.toml", "--out", copied).refused("no spec")
    spec = tiny.write_spec(copied.parent)
    tiny.cli("run", spec, "--out", copied).fine("Report:")
    assert (copied / "report.html").is_file()


def test_report_on_several_runs(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    page = tmp_path / "pages" / "both.html"
    tiny.cli("report", finished, again, "--out", page).fine("Report:", "FedAvg")
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


@pytest.mark.parametrize("page", ["page.pdf", "folder.html"])
def test_a_report_is_a_file_html(finished, tmp_path, page):
    (tmp_path / "folder.html").mkdir()
    tiny.cli("report", finished, "--out", tmp_path / page).refused("must be a .html", page)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_run_is_not_compared_with_itself(finished, tmp_path):
    same = finished / ".." / finished.name
    tiny.cli("report", finished, same, "--out", tmp_path / "p.html").refused("named twice")


def test_report_on_what_is_no_finished_run(copied, tmp_path):
    tiny.cli("report", tmp_path / "none").refused("not a run folder")
    manifest = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**manifest, "status": "running"}))
    tiny.cli("report", copied).refused("not finished", "certifl run")
    tiny.cli("verify", copied).refused("not finished")


def test_verify_passes_on_an_honest_run(finished):
    tiny.cli("verify", finished).fine("12 certificates follow from their votes")
    tiny.cli("verify", finished / "certificates.parquet").fine("12 certificates")


def raise_a_radius(run: Path) -> None:
    file = run / "certificates.parquet"
    held = Certificates.load(file)
    row = int(np.argmax(~held.abstained))
    radius = held.radius.copy()
    radius[row] = np.nextafter(radius[row], 1.0) if radius[row] else 0.01
    dataclasses.replace(held, radius=radius).save(file)


def write(name: str, text: str):
    return lambda run: (run / name).write_text(text)


def edit(name: str, old: str, new: str):
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


def break_the_certificates(run: Path) -> None:
    content = (run / "certificates.parquet").read_bytes()
    (run / "certificates.parquet").write_bytes(content[: len(content) // 2])


def lose_the_certificates(run: Path) -> None:
    (run / "certificates.parquet").unlink()


break_the_manifest = write("run.json", '{"status": "fin')


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (raise_a_radius, "larger than"),
        (edit("spec.toml", "lr = 0.05", "lr = 0.06"), "spec.toml was changed"),
        (edit("spec.toml", "alpha = 0.001", "alpha = 0.01"), "alpha = 0.001"),
        (tiny.replace_a_checkpoint, "damaged"),
        (break_the_certificates, "certificates.parquet"),
        (lose_the_certificates, "certificates.parquet"),
        (write("spec.toml", "seed = = 1"), "spec.toml is damaged"),
        (break_the_manifest, "run.json is damaged"),
        (write("run.json", "[]"), "run.json is damaged"),
    ],
)
def test_verify_fails_on_a_run_that_was_tampered_with(harm, says, copied):
    harm(copied)
    answer = tiny.cli("verify", copied)
    assert answer.code == 1
    assert says in answer.err
    assert "follow from their votes" not in answer.out


def test_a_checkpoint_replaced_together_with_its_checksum_is_noticed(copied):
    run(tiny.spec("training.lr=0.04"), Options(copied.parent / "other"))
    training = copied / "checkpoints" / "training"
    shutil.rmtree(training)
    shutil.copytree(copied.parent / "other" / "checkpoints" / "training", training)
    answer = tiny.cli("verify", copied)
    assert answer.code == 1
    assert "client 1: the stored model is not the one that was certified" in answer.err


def test_verify_tells_of_every_run_it_is_given(finished, copied):
    raise_a_radius(copied)
    answer = tiny.cli("verify", copied, finished)
    assert answer.code == 1
    assert f"{finished}: 12 certificates" in answer.out


@pytest.mark.parametrize("harm", [break_the_certificates, lose_the_certificates])
@tiny.undrawn()
def test_lost_certificates_come_back_from_the_votes(harm, finished, copied):
    harm(copied)
    votes = {k: v for k, v in tiny.files(copied).items() if "certification" in k}
    tiny.cli("run", tiny.write_spec(copied.parent), "--out", copied).fine("ACR")
    again = Certificates.load(copied / "certificates.parquet")
    assert again.same_results(Certificates.load(finished / "certificates.parquet"))
    assert {k: v for k, v in tiny.files(copied).items() if "certification" in k} == votes


def test_a_damaged_manifest_stops_the_run_until_asked_to_overwrite(copied):
    break_the_manifest(copied)
    spec = tiny.write_spec(copied.parent)
    tiny.cli("run", spec, "--out", copied).refused("run.json is damaged", "--overwrite", code=1)
    (copied / "old.txt").write_text("of the run that is replaced")
    run(tiny.spec(), Options(copied, overwrite=True))
    assert not (copied / "old.txt").exists()
    tiny.cli("verify", copied).fine("12 certificates")
