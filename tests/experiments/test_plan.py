"""`certifl plan`: exact counts, scaling, nothing written, no times asserted; `certifl doctor`."""

import importlib.util
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tiny_study as tiny
from certifl.data import load
from certifl.errors import DataUnavailable, InputError, ModelError
from certifl.experiments import plan as planning
from certifl.experiments.plan import EXPECTED_SHARE, KNOWN, Plan, plan
from certifl.study import environment as doctor
from tiny_study import cli, files, spec, write_spec

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One call of everything, and a cache that is empty."""
    monkeypatch.setattr(planning, "_SECONDS", 0.0)
    monkeypatch.setenv("CERTIFL_CACHE", str(tmp_path / "cache"))


def test_votes_are_those_of_the_certified_images():
    made = plan(spec())
    # two clients, six images each, n0 + n = 100 + 200 votes for each
    assert made.votes_at_most == 2 * 6 * 300
    assert made.votes_expected == pytest.approx(EXPECTED_SHARE * made.votes_at_most, abs=1)
    assert made.setting["images to certify"] == "12"
    assert made.setting["training images"] == "60"
    assert made.votes_per_second > 0
    assert made.certification_seconds_at_most == made.votes_at_most / made.votes_per_second
    assert made.certification_seconds == made.votes_expected / made.votes_per_second
    assert made.training_seconds > 0
    assert made.memory_bytes > 0
    assert made.device_bytes == 0
    assert any("random images of the shape of digits" in a for a in made.assumptions)
    assert any("rough share" in a for a in made.assumptions)


@pytest.mark.parametrize(
    ("setting", "times"),
    [
        ("certification.images=12", 2),
        ("certification.n=500", 2),
        ("clients.count=4", 2),
        ("certification.images=1000", 40 / 12),  # no more than the clients hold
    ],
)
def test_twice_the_work_is_twice_the_votes(setting, times):
    assert plan(spec(setting)).votes_at_most == pytest.approx(times * 3600)


@pytest.mark.parametrize("estimator", ["top-class", "runner-up"])
def test_a_fixed_number_of_votes_is_expected_in_full(estimator):
    made = plan(spec(f"certification.estimator={estimator}"))
    assert made.votes_expected == made.votes_at_most
    assert any("all votes for every image" in a for a in made.assumptions)


def test_training_is_counted_by_passes_and_extra_rounds(monkeypatch):
    """With a clock that gives every call one second, times are counts."""
    calls = []

    def second(work: object, _device: torch.device) -> float:
        work()
        calls.append(work)
        return 1.0

    monkeypatch.setattr(planning, "_measured", second)
    settings = ("training.rounds=5", "training.local_epochs=3", "training.batch_size=16")
    # One call is a pass over 16 images; two clients of 30 images make 15 passes over 60.
    assert plan(spec(*settings)).training_seconds == pytest.approx(15 * 60 / 16)
    alone = plan(spec(*settings, "algorithm.name=local"))
    assert alone.training_seconds == pytest.approx(15 * 60 / 16)
    tuned = plan(
        spec(*settings, 'algorithm={name="personalized", base={name="fedavg"}, epochs=4}')
    )
    assert tuned.training_seconds == pytest.approx((15 + 1) * 60 / 16)
    # training, votes; twice; and once with the extra round
    assert len(calls) == 2 + 2 + 3


def test_disk_grows_with_clients_only_where_they_keep_a_model():
    def disk(algorithm: str, clients: int) -> int:
        made = plan(spec(f"algorithm.name={algorithm}", f"clients.count={clients}"))
        per_image = 2 * 8 * (2 * 10 + 8)
        return made.disk_bytes - per_image * int(made.setting["images to certify"])

    assert disk("fedavg", 2) == disk("fedavg", 4)
    state = disk("fedavg", 2)  # three checkpoints of one model
    assert disk("local", 2) == 3 * state
    assert disk("local", 4) == 5 * state


def test_nothing_is_written(tmp_path, monkeypatch):
    place = write_spec(tmp_path)
    monkeypatch.chdir(tmp_path)
    before, state = files(tmp_path), torch.get_rng_state()
    done = cli("plan", place, "--set", "certification.images=3")
    done.fine("votes at most 1,800", "images to certify 6", "training about", "peak memory about")
    assert files(tmp_path) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_known_sizes_are_those_of_the_embedded_data():
    held = load("digits")
    facts = KNOWN["digits"]
    assert (facts.train, facts.test) == (len(held.train), len(held.test))
    assert (facts.shape, facts.classes) == (tuple(held.train.images.shape[1:]), held.num_classes)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_known_sizes_are_those_of_the_shared_data(name):
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data folder is not beside the checkout")
    rows = {
        split: sum(
            pq.ParquetFile(path).metadata.num_rows
            for path in (SHARED / name).rglob(f"{split}-*.parquet")
        )
        for split in ("train", "test")
    }
    assert (KNOWN[name].train, KNOWN[name].test) == (rows["train"], rows["test"])


def test_a_folder_of_images_is_planned_by_what_it_holds(tmp_path):
    for split, count in (("train", 6), ("test", 4)):
        for label in ("ant", "bee", "cat"):
            for number in range(count):
                path = tmp_path / "insects" / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.zeros((9, 11, 3), np.uint8)).save(path)
    wanted = spec("data={name='insects'}", "certification.images=100", "training.batch_size=4")
    made = plan(wanted, data_dir=tmp_path)
    assert made.setting["training images"] == "18"
    assert made.votes_at_most == 12 * 300
    assert any("those of insects" in a for a in made.assumptions)


@pytest.mark.parametrize("name", ["somebody/something", "insects", "./nowhere"])
def test_data_that_is_not_at_hand_is_not_downloaded(name, tmp_path):
    with pytest.raises(DataUnavailable, match="downloads nothing"):
        plan(spec(f"data={{name='{name}'}}"), data_dir=tmp_path)


def test_requests_that_cannot_be_planned(tmp_path):
    with pytest.raises(InputError, match="train"):
        plan(spec("data.train_images=5000"))
    with pytest.raises(InputError, match="clients"):
        plan(spec("clients.count=30", "data.train_images=20"))
    with pytest.raises(ModelError, match="nowhere"):
        plan(spec("model.name=nowhere:network"))
    with pytest.raises(InputError, match="quantum"):
        plan(spec(), device="quantum")
    cli("plan", tmp_path / "none.toml").refused("There is no spec")
    cli("plan", write_spec(tmp_path), "--set", "training.rounds=0").refused("training.rounds")


def test_a_plan_is_a_plain_record():
    made = plan(spec())
    assert isinstance(made, Plan)
    assert all(isinstance(value, str) for value in made.setting.values())
    assert all(sentence.endswith(".") for sentence in made.assumptions)


ROOT = Path(__file__).resolve().parents[2]


def by_topic(data_dir: Path | None = None) -> dict[str, doctor.Check]:
    return {check.topic: check for check in doctor.examine(data_dir)}


def test_it_says_what_runs_here():
    said = tiny.cli("doctor")
    assert said.code == 0
    for word in ("certifl", "torch", "cores", "GB free", "digits", "data folder", "bfloat16"):
        assert word in said.out, word


def test_every_extra_is_known_and_says_how_to_get_it(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = set(project["optional-dependencies"]) - {"dev", "docs", "track"}
    assert set(doctor.EXTRAS) == optional
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    found = by_topic()
    for extra in optional:
        assert f"certifl[{extra}]" in found[f"extra {extra}"].missing


def test_data_folders_that_are_not_there(tmp_path):
    (tmp_path / "mnist").mkdir()
    assert by_topic(tmp_path)["data folder"].found.endswith(": mnist")
    assert by_topic(tmp_path / "nowhere")["data folder"].missing
