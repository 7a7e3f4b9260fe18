"""Deployed models pushed with a card, to a folder and to a hub that is a folder here."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import certifl
from certifl.errors import DataUnavailable, InputError, StoreMismatch
from certifl.experiments.hub import load, push
from certifl.experiments.predict import certify_image
from certifl.experiments.run import Options, compute
from certifl.models import build, fingerprint, state_of
from tiny_study import cli, spec


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    noise = 'certification.perturbation={family="gaussian_blur", sigma=0.3}'
    few = ("certification.n=100", "certification.images=3")
    settings = ('augmentation.federated="own"', noise, *few)
    return compute(spec(*settings), Options(place / "run", explore=False)).path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a folder: what is uploaded there is downloaded from there."""
    store = tmp_path / "hub"

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            (store / name).parent.mkdir(parents=True, exist_ok=exist_ok)
            if not (store / f"{name}.private").exists():
                (store / f"{name}.private").write_text(str(private))
            return f"https://hub.example/{name}"

        def repo_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(private=(store / f"{name}.private").read_text() == "True")

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, store / repo_id)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert "README.md" in allow_patterns
        if not (store / name).is_dir():
            raise FileNotFoundError(name)
        return str(store / name)

    module = SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return store


def photo(folder: Path) -> Path:
    file = folder / "digit.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
    return file


def test_a_model_is_pushed_to_a_folder_with_its_card(run, tmp_path):
    target = tmp_path / "model"
    cli("push", run, target, "--client", "1").fine("Model and card")
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md", "card.json", "deployed.safetensors", "spec.toml", "study.json",
    ]  # fmt: skip
    card, numbers = (
        (target / "README.md").read_text(),
        json.loads((target / "card.json").read_text()),
    )
    own = certifl.Certificates.load(run / "certificates.parquet").of_client(1)
    assert numbers["images"] == len(own)
    assert numbers["certified_accuracy"] == own.certified_accuracy(numbers["radii"]).tolist()
    assert numbers["average_certified_radius"] == own.average_certified_radius()
    for words in (
        "certified against Gaussian blur", "0.3 px^2", "'sigma': 0.3", "alpha = 0.001",
        "Covered, up to rounding", "fresh votes", f"--run {target}", numbers["model_fingerprint"],
    ):  # fmt: skip
        assert words in card, words
    assert "parquet" not in card
    deployed = load(target)
    assert deployed.client == 1
    assert deployed.perturbation == certifl.GaussianBlur(0.3)
    assert fingerprint(deployed.model) == numbers["model_fingerprint"]
    said = cli("predict", photo(tmp_path), "--run", target, "--n", "100").out
    assert said == cli("predict", photo(tmp_path), "--run", run, "--client", 1, "--n", "100").out
    with pytest.raises(StoreMismatch, match="exists already"):
        push(run, str(target))


def test_rows_are_shared_only_when_asked_for_and_verify(run, tmp_path):
    push(run, str(tmp_path / "model"), share="rows")
    rows = tmp_path / "model" / "certificates.parquet"
    cli("verify", rows).fine()
    assert set(certifl.Certificates.load(rows).client.tolist()) == {0}
    assert "recomputes each radius" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(InputError, match="share must be one of curve, rows"):
        push(run, str(tmp_path / "other"), share="all")


def test_the_hub_takes_the_same_folder_and_gives_it_back(run, hub, tmp_path):
    assert push(run, "hf:me/blurred") == "https://hub.example/me/blurred"
    push(run, str(tmp_path / "folder"))
    for file in ("card.json", "deployed.safetensors", "spec.toml", "study.json"):
        assert (hub / "me/blurred" / file).read_bytes() == (
            tmp_path / "folder" / file
        ).read_bytes()
    assert (hub / "me/blurred.private").read_text() == "True"
    push(run, "hf:me/open", public=True)
    assert (hub / "me/open.private").read_text() == "False"
    (hub / "me/seen.private").write_text("False")
    with pytest.raises(InputError, match="everybody can see it: nothing was uploaded"):
        push(run, "hf:me/seen")
    assert not (hub / "me/seen").exists()
    assert load("hf:me/blurred").spec == load(tmp_path / "folder").spec
    cli("predict", photo(tmp_path), "--run", "hf:me/blurred", "--n", "100").fine("radius")
    with pytest.raises(
        DataUnavailable,
        match=r"Exchanging hf:me/absent with the Hugging Face hub failed",
    ):
        load("hf:me/absent")


def test_no_folder_of_the_machine_is_pushed_and_a_model_may_abstain_everywhere(tmp_path):
    weights = tmp_path / "of-this-machine" / "own.safetensors"
    weights.parent.mkdir()
    save_file(state_of(build("small_cnn", 1, 10, seed=7)), weights)
    settings = (f"model.weights={weights}", "training.rounds=0", "certification.images=2")
    noise = 'certification.perturbation={family="pixel", sigma=2.0}'
    asked = spec(*settings, noise, "certification.n=20", 'algorithm.name="local"')
    compute(asked, Options(tmp_path / "run", explore=False))
    weights.unlink()
    push(tmp_path / "run", str(tmp_path / "model"))
    for name in ("README.md", "card.json", "spec.toml", "study.json"):
        assert "of-this-machine" not in (tmp_path / "model" / name).read_text()
    assert load(tmp_path / "model").spec.model.weights == "own.safetensors"
    assert json.loads((tmp_path / "model" / "card.json").read_text())["radii"] == [0.0]


def test_other_weights_than_the_cards_are_refused(run, tmp_path):
    push(run, str(tmp_path / "model"))
    weights = tmp_path / "model" / "deployed.safetensors"
    state = load_file(weights)
    first = next(iter(state))
    save_file({**state, first: state[first] + 1}, weights)
    with pytest.raises(StoreMismatch, match="not those that its card is about"):
        load(tmp_path / "model")
    with pytest.raises(StoreMismatch, match="not those that its card is about"):
        certify_image(photo(tmp_path), tmp_path / "model", None, 100, False, "cpu")


def test_a_pushed_model_predicts_in_the_precision_of_its_certificates(run, tmp_path):
    """The run asked for "auto", which may stand for something else on another machine."""
    push(run, str(tmp_path / "model"))
    card = tmp_path / "model" / "card.json"
    numbers = json.loads(card.read_text())
    for precision in ("float32", "bfloat16"):
        card.write_text(json.dumps({**numbers, "precision": precision}))
        made = certify_image(photo(tmp_path), tmp_path / "model", None, 100, False, "cpu")
        assert made.certificates.conditions["precision"] == precision


def test_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataUnavailable, match=r"certifl\[hub\]"):
        push(run, "hf:me/blurred")
