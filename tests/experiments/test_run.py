"""Whole studies: every regime, every kind of images, one's own network."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny_study as tiny
from certifl.certification import Certificates
from certifl.errors import InputError, ModelError, StoreMismatch, WorkError
from certifl.experiments.run import Options, cast_votes, device_names, run
from certifl.experiments.verify import verify_run
from certifl.paper import scales as presets
from certifl.runs.folder import RunFolder
from certifl.spec import load, with_settings
from certifl.study.opened_run import OpenRun
from scripts import load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRANSLATION = {"family": "translation", "sigma": 0.1}
REGIMES: dict[str, dict[str, Any]] = {
    "local": {"name": "local"},
    "fedavg": {"name": "fedavg", "weighting": "size"},
    "personalized": {"name": "personalized", "base": {"name": "fedavg"}, "epochs": 1},
    "personalized mixture": {
        "name": "personalized",
        "base": {"name": "mixture", "personalization": 0.3},
        "epochs": 1,
    },
    "mixture": {"name": "mixture", "personalization": 0.5},
}


def certificates(folder: Path) -> Certificates:
    return RunFolder(folder).load_certificates()


def models(folder: Path) -> list[str]:
    """Fingerprints of the clients' deployed models, in the order of clients."""
    named = certificates(folder).conditions["model_fingerprint"]
    return [named[str(client)] for client in range(len(named))]


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_from_spec_to_verified_certificates(regime, tmp_path):
    algorithm = REGIMES[regime]
    augmentation: dict[str, Any] = {"federated": tiny.ROTATION}
    if algorithm["name"] == "personalized":
        augmentation["personalized"] = TRANSLATION
    study = {**tiny.VALUES, "algorithm": algorithm, "augmentation": augmentation}
    folder = run(with_settings(study, ["clients.count=3"]), Options(tmp_path / "run"))
    held = certificates(folder.path)
    assert np.unique(held.client, return_counts=True)[1].tolist() == [6, 6, 6]
    assert verify_run(folder.path).problems == ()
    assert len(set(models(folder.path))) == (1 if regime == "fedavg" else 3)
    rounds = folder.path.joinpath("history.jsonl").read_text().splitlines()
    assert len(rounds) == 2 + (algorithm["name"] == "personalized")
    assert set(json.loads(rounds[0])["clients"]) == {"0", "1", "2"}


def test_personalisation_has_an_augmentation_of_its_own(tmp_path):
    personal = {"algorithm": REGIMES["personalized"]}
    found = {}
    for name, choice in (("same", "same"), ("none", "none"), ("other", TRANSLATION)):
        values = {**tiny.VALUES, **personal}
        values["augmentation"] = {"federated": tiny.ROTATION, "personalized": choice}
        run(with_settings(values), Options(tmp_path / name))
        found[name] = models(tmp_path / name)
    assert len({tuple(fingerprints) for fingerprints in found.values()}) == 3
    # The federated rounds do not know of it.
    servers = {tiny.weights(tmp_path / name)["round-00002/server.safetensors"] for name in found}
    assert len(servers) == 1


def test_settings_override_the_file_and_stand_in_the_run(tmp_path):
    spec = tiny.write_spec(tmp_path)
    changed = ["training.rounds=1", "certification.images=3", "name=changed"]
    study = load(spec, changed)
    folder = run(study, Options(tmp_path / "run"))
    assert load(folder.spec) == study
    assert len(certificates(folder.path)) == 6
    assert json.loads((folder.path / "run.json").read_text())["name"] == "changed"


def write_pngs(folder: Path, shape: tuple[int, ...], per_class: int = 12) -> None:
    """Classes that differ in brightness, so that two rounds learn something."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("dark", "light", "bright")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(70 * number, 70 * number + 90, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


@pytest.mark.parametrize("family", ["translation", "dense_flow"])
def test_colour_images_that_are_not_square(family, tmp_path):
    write_pngs(tmp_path / "data" / "lights", (10, 12, 3))
    noise = {"family": family, "sigma": 0.05}
    values = {
        **tiny.VALUES,
        "data": {"name": "lights"},
        "augmentation": {"federated": noise},
        "certification": {"perturbation": noise, "images": 6, "n": 200},
    }
    folder = run(with_settings(values), Options(tmp_path / "run", tmp_path / "data"))
    data = folder.manifest()["data"]
    assert (data["in_channels"], data["image_size"]) == (3, [10, 12])
    assert data["class_names"] == ["bright", "dark", "light"]
    assert verify_run(folder.path).problems == ()
    if family == "translation":
        picture = tmp_path / "data" / "lights" / "test" / "dark" / "0.png"
        tiny.cli("predict", picture, "--run", folder.path).fine("translation", "client 0")
        turned = tmp_path / "turned.png"
        Image.open(picture).rotate(90, expand=True).save(turned)
        tiny.cli("predict", turned, "--run", folder.path).refused("12 x 10", "10 x 12")


def test_a_table_with_columns_named_by_somebody_else(tmp_path):
    place = tmp_path / "digits2"
    write_pngs(tmp_path / "png", (9, 9))
    place.mkdir()
    for split in ("train", "test"):
        rows = sorted((tmp_path / "png" / split).rglob("*.png"))
        names = [path.parent.name for path in rows]
        table = {
            "scan": pa.array([{"bytes": path.read_bytes(), "path": None} for path in rows]),
            "ward": pa.array([i % 4 for i in range(len(rows))]),
            "finding": pa.array([("dark", "light", "bright").index(name) for name in names]),
        }
        pq.write_table(pa.table(table), place / f"{split}-00000-of-00001.parquet")
    values = {**tiny.VALUES, "data": {"name": "digits2", "label_column": "finding"}}
    folder = run(with_settings(values), Options(tmp_path / "run", tmp_path))
    assert folder.manifest()["data"]["num_classes"] == 3
    wards = {**tiny.VALUES, "data": {"name": "digits2[ward]"}}
    folder = run(with_settings(wards), Options(tmp_path / "wards", tmp_path))
    assert folder.manifest()["data"]["num_classes"] == 4
    # Which of the two is the label is not guessed.
    unclear = {**tiny.VALUES, "data": {"name": "digits2"}}
    spec = tmp_path / "unclear.toml"
    spec.write_text(with_settings(unclear).to_toml())
    out = ("--out", tmp_path / "r", "--data-dir", tmp_path)
    tiny.cli("run", spec, *out).refused("ward", "finding")


def test_images_that_changed_under_a_run_are_noticed(tmp_path):
    write_pngs(tmp_path / "lights", (8, 8))
    study = with_settings({**tiny.VALUES, "data": {"name": "lights"}})
    folder = run(study, Options(tmp_path / "run", tmp_path))
    folder.certificates.unlink()  # the run is no longer complete
    Image.new("L", (8, 8), 7).save(tmp_path / "lights" / "train" / "dark" / "0.png")
    with pytest.raises(StoreMismatch, match="other images"):
        run(study, Options(tmp_path / "run", tmp_path))
    net = ("certify", "--run", folder.path, "--data-dir", tmp_path, "--out", tmp_path / "c.tsv")
    tiny.cli(*net).refused("no run" if not folder.finished() else "other images")


NETWORK = """
from torch import nn

def make(in_channels, num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )

class ByBatch(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(64, classes)
    def forward(self, images):
        return self.last((images - images.mean(0)).flatten(1))

def by_batch(in_channels, num_classes):
    return ByBatch(num_classes)
"""


@pytest.mark.usefixtures("own_modules")
@tiny.undrawn()
def test_a_network_beside_the_spec(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "my_network.py").write_text(NETWORK)
    own = ("model.name=my_network:make", "model.options={width=5}", "training.rounds=1")
    spec = tiny.write_spec(home, *own)
    monkeypatch.chdir(tmp_path)
    tiny.cli("run", spec, "--out", "run").fine("FedAvg")
    tiny.cli("verify", "run").fine("12 certificates")
    # The code runs elsewhere only if the user says where it is: a run folder may be anybody's.
    Image.new("L", (8, 8), 90).save("gray.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    asked = ("predict", "../gray.png", "--run", "../run")

    monkeypatch.chdir(elsewhere)

    def later(*arguments: str | Path) -> tiny.Outcome:
        """As in a process that has not imported the network."""
        sys.modules.pop("my_network", None)
        return tiny.cli(*arguments)

    later(*asked).refused("--code DIR", str(home))
    later(*asked, "--code", home).fine("client 0")
    # Checking a run does not run its code.
    (home / "my_network.py").write_text("raise RuntimeError('this ran')")
    later("verify", "../run").fine("12 certificates")
    later(*asked, "--code", home).refused("my_network:make", "this ran")


@pytest.mark.usefixtures("own_modules")
def test_a_network_that_changed_since_is_refused(tmp_path):
    (tmp_path / "changing.py").write_text(NETWORK)
    sys.path.append(str(tmp_path))
    study = tiny.spec("model.name=changing:make", "training.rounds=1")
    folder = run(study, Options(tmp_path / "run"))
    sys.modules["changing"].make = sys.modules["changing"].by_batch
    Image.new("L", (8, 8), 90).save(tmp_path / "gray.png")
    asked = ("predict", tmp_path / "gray.png", "--run", folder.path)
    tiny.cli(*asked).refused("--code DIR", "changing:make")
    tiny.cli(*asked, "--code", tmp_path).refused("do not fit", "changing:make")


@pytest.mark.usefixtures("own_modules")
def test_a_network_that_cannot_be_certified_is_refused_before_training(tmp_path):
    (tmp_path / "unfit.py").write_text(NETWORK)
    sys.path.append(str(tmp_path))
    with pytest.raises(ModelError, match="another batch"):
        run(tiny.spec("model.name=unfit:by_batch"), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_overwrite_replaces_and_nothing_else_does(tmp_path):
    first = run(tiny.spec(), Options(tmp_path / "run"))
    before, held = tiny.files(first.path), certificates(first.path)
    assert run(tiny.spec(), Options(tmp_path / "run")) == first
    with pytest.raises(StoreMismatch, match="another study"):
        run(tiny.spec("seed=1"), Options(tmp_path / "run"))
    assert tiny.files(first.path) == before
    run(tiny.spec("seed=1"), Options(tmp_path / "run", overwrite=True))
    run(tiny.spec("seed=1"), Options(tmp_path / "new"))
    assert certificates(tmp_path / "run").same_results(certificates(tmp_path / "new"))
    assert not certificates(tmp_path / "new").same_results(held)
    assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "new")


def test_a_finished_training_beside_is_taken_over_only_if_it_is_the_same(tmp_path, caplog):
    caplog.set_level("INFO")
    first = run(tiny.spec(), Options(tmp_path / "first"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    beside = (tmp_path / "broken", tmp_path / "none", first.path)
    for name, setting, taken in (
        ("same", "certification.n=150", True),
        ("other", "seed=1", False),
    ):
        caplog.clear()
        run(tiny.spec(setting), Options(tmp_path / name, siblings=beside))
        assert ("taking over" in caplog.text) is taken
        run(tiny.spec(setting), Options(tmp_path / f"{name} alone"))
        assert models(tmp_path / name) == models(tmp_path / f"{name} alone")


@pytest.mark.usefixtures("own_modules")
def test_the_training_of_a_network_whose_code_may_have_changed_is_not_taken_over(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "my_network.py").write_text(NETWORK)
    sys.path.append(str(tmp_path))
    own = ("model.name=my_network:make", "training.rounds=1")
    first = run(tiny.spec(*own), Options(tmp_path / "first"))
    run(tiny.spec(*own, "certification.n=150"), Options(tmp_path / "n", siblings=(first.path,)))
    assert "taking over" not in caplog.text


@tiny.undrawn()
def test_quickstart_shows_all_regimes_on_one_page_and_is_not_done_twice(tmp_path, monkeypatch):
    def small(seed: int) -> dict[str, Any]:
        chosen = {"fedavg": {"name": "fedavg"}, "personalized": REGIMES["personalized"]}
        return {
            name: with_settings({**tiny.VALUES, "seed": seed, "algorithm": algorithm})
            for name, algorithm in chosen.items()
        }

    monkeypatch.setattr(presets, "quickstart", small)
    place = tmp_path / "quickstart"
    asked = ("quickstart", "--out", place, "--seed", "3")
    tiny.cli(*asked).fine("FedAvg", "Personalized", "Report:", "Figures:")
    assert {"fedavg", "personalized", "figures", "report.html"} == set(os.listdir(place))
    alone = run(small(3)["personalized"], Options(tmp_path / "alone"))
    # Taking over the base's training gives the model of a run on its own.
    assert models(alone.path) == models(place / "personalized")
    before = tiny.files(place)
    tiny.cli(*asked).fine("FedAvg", "Personalized")
    assert tiny.files(place) == before


@pytest.mark.usefixtures("own_modules")
def test_the_example_of_a_network_of_ones_own(tmp_path):
    short = ("training.rounds=2", "certification.images=4", "certification.n=200")
    sys.path.append(str(EXAMPLES))
    folder = run(load(EXAMPLES / "own_model.toml", short), Options(tmp_path / "run"))
    assert verify_run(folder.path).checked == 20
    assert folder.manifest()["code"] == str(EXAMPLES)


@pytest.mark.usefixtures("own_modules")
def test_the_example_of_a_model_somebody_has(capsys):
    example = load_script("examples/certify_your_model.py")
    example.EPOCHS, example.TESTED = 3, 12
    example.main()
    said = capsys.readouterr().out
    shares = [int(line.split()[-1][:-1]) for line in said.splitlines() if "degrees" in line]
    assert len(shares) == 4
    assert shares[0] >= 70
    assert shares == sorted(shares, reverse=True)


# Certification by several processes gives what one process gives.


def test_two_processes_cast_the_votes_of_one(tmp_path):
    study, seen = tiny.spec("clients.count=3"), []
    alone = run(study, Options(tmp_path / "alone", device="cpu"))
    told = {"report": lambda what, done, total, _unit: seen.append((what, done, total))}
    shared = run(study, Options(tmp_path / "shared", device="cpu,cpu", **told))
    assert shared.load_certificates().same_results(alone.load_certificates())
    voted = [(done, total) for what, done, total in seen if what == "certifying"]
    assert voted[-1][0] == voted[-1][1]


def test_a_process_that_fails_is_reported_with_its_reason(tmp_path):
    folder = run(tiny.spec(), Options(tmp_path / "run", device="cpu", explore=False))
    for server in folder.training.glob("round-*/server.safetensors"):
        server.write_bytes(b"damaged")
    with pytest.raises(WorkError, match=r"missing or damaged|ended early"):
        cast_votes(OpenRun(folder.path), None, ("cpu",), None)


def test_names_of_devices():
    assert device_names("cpu") == ("cpu",)
    assert device_names("cpu, cpu") == ("cpu", "cpu")
    with pytest.raises(InputError, match="device is empty"):
        device_names(" , ")
    with pytest.raises(InputError, match="cannot be used"):
        device_names("cpu,quantum")
