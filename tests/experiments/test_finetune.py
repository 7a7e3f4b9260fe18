"""Own weights in a spec, and fine-tuning that is certified before and after."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from certifl.deploy.client.settings import DECISIONS
from certifl.deploy.server import start as deploy
from certifl.errors import RequestError, SpecError
from certifl.experiments.run import Options, compute
from certifl.experiments.standalone import read_perturbation
from certifl.experiments.verify import verify_run
from certifl.federated.trainer import Checkpoints
from certifl.models import build, fingerprint, state_of
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
    assert latest is not None
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
    assert DECISIONS["model.weights"].what == "refused"
