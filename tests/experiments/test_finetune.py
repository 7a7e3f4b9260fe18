"""Fine-tuning of given weights, and clients that join after training: both start from a model."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from certifl.deploy.client.settings import Settings, check_study
from certifl.deploy.schemas import Rejected
from certifl.deploy.server import start as deploy
from certifl.deploy.server.start import check_start
from certifl.errors import RequestError, SpecError
from certifl.experiments import run as run_module
from certifl.experiments.plan import plan
from certifl.experiments.run import Options, compute
from certifl.experiments.standalone import read_perturbation
from certifl.experiments.verify import verify_run
from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.trainer import Checkpoints
from certifl.models import build, fingerprint, state_of
from certifl.report import load_runs, summary_rows, write_report
from certifl.report.results import TRAINED, UNSEEN, by_perturbation
from certifl.report.seed_table import seed_table
from certifl.spec import load_stored, received
from certifl.study.opened_run import OpenRun
from tiny_study import cli, files, spec

# One process computes what its tests share.
pytestmark = [pytest.mark.xdist_group("finetune"), pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(state_of(build("small_cnn", 1, 10, seed=7)), path)
    return path


@pytest.fixture(scope="module")
def tuned(weights) -> Path:
    out = weights.parent / "out"
    command = (
        *("finetune", "--model", "small_cnn", "--weights", weights, "--data", "digits"),
        *("--perturbation", "rotation:18deg", "--epochs", "2", "--images", "4", "--n", "100"),
        *("--set", "data.train_images=60", "--out", out),
    )
    cli(*command).fine("Before fine-tuning", "After fine-tuning", "finetuned.safetensors")
    before = files(out / "after"), files(out / "before")
    cli(*command).fine("After fine-tuning")
    assert (files(out / "after"), files(out / "before")) == before
    return out


def test_before_are_the_given_weights_and_after_are_trained_ones(tuned, weights):
    given, before = load_file(weights), OpenRun(tuned / "before").state(0)
    assert all(torch.equal(before[name], given[name]) for name in given)
    after = OpenRun(tuned / "after")
    assert len(after.history) == 2
    assert after.last_round.identity["initial_model"] == fingerprint(given)
    saved = load_file(tuned / "finetuned.safetensors")
    assert fingerprint(saved) == fingerprint(after.state(0)) != fingerprint(given)


def test_both_certify_the_same_images_on_one_page(tuned):
    before, after = (OpenRun(tuned / name).certificates for name in ("before", "after"))
    assert before.index.tolist() == after.index.tolist()
    page = (tuned / "report.html").read_text()
    assert "Before fine-tuning" in page
    assert "After fine-tuning" in page


def test_a_run_is_verified_without_the_file(tuned, weights, tmp_path):
    copy = tmp_path / "after"
    shutil.copytree(tuned / "after", copy)
    moved = weights.rename(weights.with_name("moved.safetensors"))
    try:
        assert "initial weights" in verify_run(copy, None, None).compared
        assert not verify_run(copy, None, None).problems
        kept = load_file(copy / "initial.safetensors")
        name = next(iter(kept))
        save_file({**kept, name: kept[name] + 1}, copy / "initial.safetensors")
        assert any("initial" in found for found in verify_run(copy, None, None).problems)
        with pytest.raises(SpecError, match="no weights at"):
            spec(f'model.weights="{weights}"')
    finally:
        moved.rename(weights)


def test_the_hash_is_of_the_weights_not_of_their_path(weights, tmp_path):
    asked = spec(f'model.weights="{weights}"')
    copy = shutil.copy(weights, tmp_path / "copy.safetensors")
    assert spec(f'model.weights="{copy}"').hash() == asked.hash() != spec().hash()
    assert asked.training_hash() != spec().training_hash()
    other = tmp_path / "other.safetensors"
    save_file(state_of(build("small_cnn", 1, 10, seed=8)), other)
    assert spec(f'model.weights="{other}"').hash() != asked.hash()
    stored = tmp_path / "spec.toml"
    stored.write_text(asked.to_toml().replace(str(weights), "/no/such/file"))
    assert load_stored(stored).hash() == asked.hash()
    pinned = (f'model.weights="{other}"', f'model.weights_sha256="{asked.model.weights_sha256}"')
    with pytest.raises(SpecError, match="is not the file that weights_sha256 is of"):
        spec(*pinned)


def test_any_algorithm_begins_with_them(weights, tmp_path):
    run = compute(
        spec(f'model.weights="{weights}"', "training.rounds=1"),
        Options(tmp_path / "run", device="cpu", explore=False),
    )
    latest = Checkpoints(run.folder.training).latest()
    assert latest.identity["initial_model"] == fingerprint(load_file(weights))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("training.rounds=0",), "give model.weights"),
        (('model.weights_sha256="' + 64 * "0" + '"',), "needs weights"),
        (('model.weights="/no/such/file.pt"',), "no weights at"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(SpecError, match=words):
        spec(*settings)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(weights, tmp_path):
    command = ("finetune", "--weights", weights, "--data", "digits", "--out", tmp_path / "out")
    wide = cli(*command, "--model", "small_resnet", "--perturbation", "rotation:18deg")
    wide.refused("does not fit small_resnet")
    cli(*command, "--model", "small_cnn", "--perturbation", "rotation").refused("sigma")
    assert not (tmp_path / "out").exists()


def test_how_a_perturbation_is_written():
    wanted = {"family": "rotation", "sigma": "18deg"}
    assert read_perturbation("rotation:18deg", None) == wanted
    assert read_perturbation("rotation", "18deg") == wanted
    assert read_perturbation('{ family = "rotation" }', "18deg") == wanted
    assert read_perturbation("pixel:0.25", None) == {"family": "pixel", "sigma": 0.25}


def test_no_server_names_a_file_of_a_client(weights):
    asked = spec(f'model.weights="{weights}"')
    with pytest.raises(SpecError, match="a server may not"):
        received(asked.to_toml())
    with pytest.raises(RequestError, match="drawn from the seed"):
        deploy.check_start(asked, deploy.Options(Path("unused")))


SETTINGS = ("clients.count=3", "clients.unseen=1", "training.rounds=1", "certification.images=12")
PERSONALIZED = 'algorithm={name="personalized",base="fedavg",epochs=1}'


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, OpenRun]:
    folder = tmp_path_factory.mktemp("unseen")
    made: dict[str, OpenRun] = {}
    for name, more in (("fedavg", ()), ("personalized", (PERSONALIZED,))):
        siblings = tuple(run.path for run in made.values())
        options = Options(folder / name, device="cpu", siblings=siblings, explore=False)
        made[name] = compute(spec(*SETTINGS, *more), options)
    local = Options(folder / "local", device="cpu", explore=False)
    seen = [s for s in SETTINGS if "unseen" not in s]
    made["local"] = compute(spec(*seen, 'algorithm={name="local"}'), local)
    return made


def test_it_is_in_no_round_and_is_given_the_global_model(runs):
    run = OpenRun(runs["fedavg"].path)
    assert [entry["participants"] for entry in run.history] == [[0, 1]]
    assert run.manifest["unseen"] == [2]
    given, shared = run.state(2), run.state(0)
    assert all(torch.equal(given[name], shared[name]) for name in shared)
    assert set(run.certificates.client.tolist()) == {0, 1, 2}


def test_personalization_fine_tunes_it_on_its_own_images(runs):
    run, base = OpenRun(runs["personalized"].path), OpenRun(runs["fedavg"].path)
    assert [entry["participants"] for entry in run.history] == [[0, 1], [0, 1, 2]]
    tuned, given = run.state(2), base.state(2)
    assert any(not torch.equal(tuned[name], given[name]) for name in given)


def test_a_run_with_an_unseen_client_verifies(runs):
    for name in ("fedavg", "personalized"):
        assert not verify_run(runs[name].path, None, None).problems


def test_the_report_shows_it_apart(runs, tmp_path):
    loaded = load_runs([run.path for run in runs.values()])
    groups = by_perturbation(loaded)
    assert [group[0].group for group in groups] == [TRAINED, UNSEEN]
    assert [run.clients.tolist() for run in groups[1]] == [[2]] * 3  # also of local, on its own
    rows = summary_rows(loaded)
    assert [row["of_clients"] for row in rows] == [[0, 1]] * 3 + [[2]] * 3
    assert all(UNSEEN in row["perturbation"] for row in rows[3:])
    assert [part.title for part in seed_table(loaded).parts] == [TRAINED, UNSEEN]
    written = write_report(loaded, tmp_path / "page.html", figures=False).read_text()
    assert "took part in no round of training" in written
    assert "Groups of clients" in written


def test_its_training_images_are_never_used(runs, tmp_path):
    """The same training, with the unseen client's images replaced, gives the same model."""
    run = OpenRun(runs["fedavg"].path)
    own, images = run.partition.clients[2].train.tolist(), run.dataset.train.images.clone()
    images[own] = 255 - images[own]
    dataset = replace(run.dataset, train=replace(run.dataset.train, images=images))
    again = OpenRun(tmp_path / "again")
    again.spec = run.spec
    again.dataset, again.partition = dataset, run.partition
    again.architecture = run_module.initial_model(run.spec, dataset)
    again.folder.begin(run.spec.to_toml(), run.spec.hash())
    last = run_module._train(again, Options(tmp_path / "again", device="cpu"), "cpu", lambda: None)
    trained, before = last.server()["model"], run.last_round.server()["model"]
    assert all(torch.equal(trained[name], before[name]) for name in before)


def test_it_resumes_with_the_same_bits(runs, tmp_path):
    def stop(what: str, done: int, total: int, unit: str) -> None:
        if done == 2:  # both clients of the only round, before the unseen one is fine-tuned
            raise KeyboardInterrupt

    asked, out = spec(*SETTINGS, PERSONALIZED), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        compute(asked, Options(out, device="cpu", report=stop, explore=False))
    again = compute(asked, Options(out, device="cpu", explore=False))
    assert again.certificates.same_results(runs["personalized"].certificates)


def test_the_plan_and_the_hash_know_it():
    assert spec(*SETTINGS).training_hash() != spec(*SETTINGS, "clients.unseen=0").training_hash()
    assert spec("clients.unseen=0").hash() == spec().hash()
    assert int(plan(spec(*SETTINGS)).setting["images to certify"]) == 36


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("clients.unseen=2",), ("leaves none to train",)),
        (("clients.unseen=1", 'algorithm={name="local"}'), ("local", "trains alone")),
        (
            ("clients.unseen=1", 'algorithm={name="mixture",personalization=0.5}'),
            ("mixture", "unseen client has no such model"),
        ),
        (
            ("clients.unseen=1", 'algorithm={name="personalized",base="local"}'),
            ("local", "trains alone"),
        ),
        (("clients.unseen=1", "clients.min_clients=2"), ("min_clients",)),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(settings, words):
    with pytest.raises(SpecError) as refused:
        spec(*settings)
    assert all(word in str(refused.value) for word in words)


def test_a_federation_over_a_network_refuses_it():
    asked = spec(*SETTINGS)
    with pytest.raises(RequestError, match="does not join"):
        check_start(asked, deploy.Options(Path("unused")))
    with pytest.raises(Rejected, match="unseen"):
        check_study(asked, Settings(client=0, data="digits"))


def test_every_algorithm_that_can_give_a_model_has_a_global_one():
    for name, row in ALGORITHMS.rows.items():
        algorithm = ALGORITHMS[name]
        if row.no_unseen is None:
            assert not algorithm.keeps_client_state or algorithm.extra_rounds, name
        else:
            assert algorithm.keeps_client_state, name
