"""Every client its own perturbation, or none: training, certificates, verdicts, report."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import certifl
import tiny_federation
import tiny_study as tiny
from certifl.certification.certificates import Predictions
from certifl.cli.terminal import show_summary
from certifl.data import to_float
from certifl.errors import InputError, StoreMismatch
from certifl.experiments import plan as planning
from certifl.experiments.attack import Options as AttackOptions
from certifl.experiments.attack import attack_run
from certifl.experiments.run import Options, run
from certifl.experiments.verify import verify_run
from certifl.federated.batches import PerClient, augmentation_of, combine_augmentations
from certifl.federated.trainer import train
from certifl.paper.claims.runs import find_runs
from certifl.report import figures, load_run, summary_rows, write_figures, write_report
from certifl.report.figures import Drawing
from certifl.report.results import by_perturbation, check_comparable
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from certifl.study.opened_run import OpenRun
from own_study import OWN, spec


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Client 0 rotation, client 1 pixel noise, client 2 nothing; each trained with its own."""
    place = tmp_path_factory.mktemp("runs") / "mixed"
    return run(spec(OWN, "algorithm.name=local"), Options(place)).path


@pytest.fixture
def copied(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "copy"))


def test_a_client_trains_as_if_all_trained_like_it():
    """Oracle: the same client in a federation whose one augmentation is the client's."""
    noises = (tiny_federation.Noise(0.1), tiny_federation.Noise(0.5), None)
    start = certifl.models.state_of(tiny_federation.TinyNet())
    mine = tiny_federation.training(augmentation=PerClient(noises))
    for client, noise in enumerate(noises):
        data = tiny_federation.client_data(client)
        found = mine.train_epochs(start, data, 1).state
        alone = tiny_federation.training(augmentation=noise).train_epochs(start, data, 1).state
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_choices_that_agree_are_one_and_strangers_are_refused():
    noise = tiny_federation.Noise()
    assert combine_augmentations([noise, tiny_federation.Noise()]) is noise
    assert combine_augmentations([None, None]) is None
    assert augmentation_of(noise, 7) is noise
    with pytest.raises(InputError, match="client 2 has none"):
        augmentation_of(PerClient((noise, None)), 2)


def test_a_checkpoint_belongs_to_the_choices_it_was_trained_with(tmp_path):
    clients, model = tiny_federation.clients(2), tiny_federation.TinyNet()
    for choices in ((tiny_federation.Noise(), None), (None, tiny_federation.Noise())):
        training = tiny_federation.training(augmentation=PerClient(choices), rounds=1)
        place = Checkpoints(tmp_path)
        if choices[0] is not None:
            train(certifl.federated.FedAvg(), model, clients, training, place)
        else:
            with pytest.raises(StoreMismatch, match="augmentation"):
                train(certifl.federated.FedAvg(), model, clients, training, place)


def test_each_client_is_certified_as_by_a_direct_call(mixed):
    """Oracle: `certify` with the client's model, images and perturbation."""
    opened = OpenRun(mixed)
    made = opened.spec
    for client in (0, 1):
        own = opened.certificates.of_client(client)
        part = opened.dataset.test.take(own.index)
        asked = (opened.model(client), to_float(part.images), made.perturbations()[client])
        options = {"labels": part.labels, "n": made.certification.n, "seed": made.seed}
        direct = certifl.certify(*asked, **options)
        for column in ("predicted", "radius", "p_lower", "counts", "looks"):
            assert np.array_equal(getattr(own, column), getattr(direct, column)), column
        assert own.conditions["unit"] == ("radians", "intensity")[client]
        assert own.average_certified_radius() == direct.average_certified_radius()


def test_who_certifies_nothing_leaves_plain_predictions(mixed):
    opened = OpenRun(mixed)
    plain = opened.predictions
    part = opened.dataset.test.take(plain.index)
    logits = opened.model(2)(to_float(part.images))
    assert plain.clients == [2]
    assert plain.predicted.tolist() == logits.argmax(1).tolist()
    assert plain.accuracy(2) == (logits.argmax(1) == part.labels).float().mean().item()
    counted = {"images": len(plain), "correct": int(plain.correct.sum())}
    assert opened.manifest["plain"] == {"2": counted}
    assert sorted(set(opened.certificates.client.tolist())) == [0, 1]


def test_radii_of_different_meaning_have_no_average(mixed, tmp_path):
    certificates = RunFolder(mixed).load_certificates()
    for average in (
        certificates.average_certified_radius,
        lambda: certificates.certified_accuracy([0.0]),
        lambda: certificates.save(tmp_path / "all.tsv"),
    ):
        with pytest.raises(InputError, match="by_kind"):
            average()
    assert [part.conditions["family"] for part in certificates.by_kind()] == ["rotation", "pixel"]
    assert "unit" not in certificates.conditions
    for part in certificates.by_perturbation():
        part.save(tmp_path / "one.tsv")
        assert len(certifl.Certificates.load(tmp_path / "one.tsv")) == len(part)
        assert "perturbations" not in part.conditions


def test_files_and_joints_keep_whose_perturbation_is_which(mixed, tmp_path):
    certificates = RunFolder(mixed).load_certificates()
    parts = [certificates.of_client(client) for client in (1, 0)]
    again = certifl.Certificates.concatenate(parts)
    assert again.of_client(0).conditions == certificates.of_client(0).conditions
    again.save(tmp_path / "again.parquet")
    back = certifl.Certificates.load(tmp_path / "again.parquet")
    assert back.conditions == again.conditions
    assert back.same_results(again)
    alone = [dataclasses.replace(part, client=np.zeros_like(part.client)) for part in parts]
    with pytest.raises(InputError, match="one client several perturbations"):
        certifl.Certificates.concatenate(alone)


def test_sigmas_of_one_family_do_have_an_average(mixed):
    first = RunFolder(mixed).load_certificates().of_client(0)
    described = {**first.conditions["description"], "sigma": 0.2}
    metadata = {**first.conditions, "sigma": 0.2, "description": described}
    second = dataclasses.replace(
        first, client=first.client + 5, radius=first.radius / 2, conditions=metadata
    )
    both = certifl.Certificates.concatenate([first, second])
    assert "sigma" not in both.conditions
    assert both.conditions["unit"] == "radians"
    expected = (first.average_certified_radius() + second.average_certified_radius()) / 2
    assert both.average_certified_radius() == pytest.approx(expected, rel=1e-12)
    assert [part.conditions["sigma"] for part in both.by_perturbation()] == [
        first.conditions["sigma"],
        0.2,
    ]


def test_lost_files_come_back_and_nothing_else_changes(copied):
    before = RunFolder(copied)
    certificates, plain = before.load_certificates(), before.load_predictions()
    before.certificates.unlink()
    before.predictions.unlink()
    again = run(OpenRun(copied).spec, Options(copied))
    assert again.load_certificates().same_results(certificates)
    assert again.load_predictions().predicted.tolist() == plain.predicted.tolist()


def test_an_honest_run_passes(mixed):
    assert verify_run(mixed).problems == ()
    assert tiny.cli("verify", mixed).code == 0


@pytest.mark.parametrize("client", [0, 1])
def test_a_planted_radius_is_found_in_either_unit(client, copied):
    folder = RunFolder(copied)
    held = folder.load_certificates()
    row = int(np.flatnonzero((held.client == client) & ~held.abstained)[0])
    radius = held.radius.copy()
    radius[row] = np.nextafter(radius[row], 1.0)
    dataclasses.replace(held, radius=radius).save(folder.certificates)
    (problem,) = verify_run(copied).problems
    assert problem.startswith(f"client {client}, image {held.index[row]}: its radius")
    assert tiny.cli("verify", copied).code == 1


def _swapped(held: certifl.Certificates) -> certifl.Certificates:
    first, second = held.conditions["perturbations"]
    groups = [{**first, "clients": second["clients"]}, {**second, "clients": first["clients"]}]
    return dataclasses.replace(held, conditions={**held.conditions, "perturbations": groups})


def _unowned(held: certifl.Certificates) -> certifl.Certificates:
    groups = [{**group, "clients": [0]} for group in held.conditions["perturbations"]]
    return dataclasses.replace(held, conditions={**held.conditions, "perturbations": groups})


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_swapped, "the certificates of client 0 say family = 'pixel', the spec 'rotation'"),
        (_unowned, "perturbations are recorded for its client instead of one"),
        (lambda held: held.of_client(0), "some clients have no certificates"),
    ],
)
def test_a_changed_record_of_who_certifies_what_is_found(harm, says, copied):
    folder = RunFolder(copied)
    harm(folder.load_certificates()).save(folder.certificates)
    assert any(says in problem for problem in verify_run(copied).problems)


def test_plain_predictions_are_checked_too(copied):
    folder = RunFolder(copied)
    plain = folder.load_predictions()
    doubled = Predictions.concatenate([plain, plain])
    doubled.save(folder.predictions)
    assert "an image is predicted twice for one client" in verify_run(copied).problems
    other = {**plain.conditions, "model_fingerprint": {"2": "0"}}
    dataclasses.replace(plain, conditions=other).save(folder.predictions)
    assert any("client 2: the stored model" in text for text in verify_run(copied).problems)
    folder.predictions.unlink()
    tiny.cli("verify", copied).refused("no plain predictions", code=1)


def test_the_report_has_a_panel_for_each_perturbation(copied):
    held = RunFolder(copied).load_certificates()
    result = attack_run(copied, AttackOptions(images=2, directions=4))
    assert [(part["family"], part["clients"]) for part in result["perturbations"]] == [
        ("rotation", [0]),
        ("pixel", [1]),
    ]
    attacked = [part["parameters"]["images"] for part in result["perturbations"]]
    assert result["parameters"]["images"] == sum(attacked)
    assert result["deformed_first"] is None
    page = write_report([copied], copied / "report.html", figures=False)
    text = page.read_text()
    shown = json.loads(text.split('id="report-data">')[1].split("</script>")[0])["groups"]
    panels = text.split('<div class="panel"')[1:]
    assert len(panels) == len(shown) == 2
    for client, (panel, numbers) in enumerate(zip(panels, shown, strict=True)):
        assert f'href="#perturbation-{client + 1}"' in text
        assert f'id="perturbation-{client + 1}"' in panel
        assert f"0 of {attacked[client]}" in panel
        assert numbers["clients"] == [client]
        assert numbers["runs"][0]["mean"] == held.of_client(client).average_certified_radius()
        assert [unit["name"] for unit in numbers["units"]] == [
            *(["degrees", "radians"] if client == 0 else ["intensity"]),
            "% of σ",
        ]
    assert "Clients that certify nothing" in text
    assert "degree" not in panels[1].split("<section id=")[0]
    names = re.findall(r' id="([^"]*)"', text)
    assert len(names) == len(set(names))


def test_figures_of_each_perturbation_have_a_folder(mixed, monkeypatch):
    saved: list[tuple[str, str]] = []

    def note(_drawn: Drawing, folder: Path, stem: str, _formats: object) -> list[Path]:
        saved.append((folder.name, stem))
        return []

    monkeypatch.setattr(figures, "save", note)
    write_figures([load_run(mixed)], Path("figures"))
    stems = ("curves", "clients", "average_radius", "history")
    assert saved == [(noise, stem) for noise in ("rotation", "pixel") for stem in stems]


def test_rows_are_about_one_perturbation_each(mixed, capsys):
    rows = summary_rows([mixed])
    held = RunFolder(mixed).load_certificates()
    assert [row["of_clients"] for row in rows] == [[0], [1]]
    assert [row["acr"] for row in rows] == [
        held.of_client(client).average_certified_radius() for client in (0, 1)
    ]
    assert [one["client"] for one in rows[0]["plain"]] == [2]
    show_summary(rows)
    shown = capsys.readouterr().out
    assert "certified by client 1" in shown
    assert shown.count("client 2 certifies nothing: plain accuracy") == 1


def test_runs_that_certify_otherwise_do_not_stand_side_by_side(mixed):
    results = load_run(mixed)
    swapped = dataclasses.replace(results, certificates=_swapped(results.certificates))
    only = dataclasses.replace(results, certificates=results.certificates.of_client(0))
    for other in (swapped, only):
        with pytest.raises(StoreMismatch, match="differ in perturbations of clients"):
            check_comparable([results, other])
    check_comparable([results, results])
    assert len(by_perturbation([results, results])) == 2


def test_claims_leave_such_runs_out(mixed):
    with pytest.raises(StoreMismatch, match="different perturbations"):
        find_runs([mixed])
    runs, notes = find_runs([mixed.parent])
    assert runs == []
    assert "mixed was left out" in notes[0]


def test_an_attack_takes_the_clients_own_perturbation(copied):
    folder = RunFolder(copied)
    held = folder.load_certificates()
    claimed = (held.client == 1) & ~held.abstained
    dataclasses.replace(held, radius=np.where(claimed, 9.0, held.radius)).save(folder.certificates)
    outcome = tiny.cli("attack", copied, "--images", "2", "--directions", "8")
    assert outcome.code == 1
    assert "WRONG  client 1" in outcome.out
    assert "WRONG  client 0" not in outcome.out
    with pytest.raises(InputError, match="certificates of"):
        attack_run(copied, AttackOptions(client=2))


def test_one_image_is_asked_with_the_clients_own(mixed, tmp_path):
    picture = tmp_path / "gray.png"
    Image.new("L", (8, 8), 90).save(picture)
    for client, unit in ((0, "radians"), (1, "intensity")):
        tiny.cli("predict", picture, "--run", mixed, "--client", str(client)).fine(unit)
    tiny.cli("predict", picture, "--run", mixed, "--client", "2").refused("certifies nothing")


def test_a_plan_counts_votes_of_those_who_certify(monkeypatch):
    monkeypatch.setattr(planning, "_SECONDS", 0.01)
    votes = planning.plan(spec()).votes_at_most
    assert votes == 2 * tiny.VALUES["certification"]["images"] * (100 + 200)
