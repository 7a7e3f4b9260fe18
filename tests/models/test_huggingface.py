"""Classifiers of transformers, made on the spot: logits, normalization, classes, refusals."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig
from transformers import ViTForImageClassification as ViT

import certifl
from certifl.errors import InputError, ModelError, StoreMismatch
from certifl.experiments.hub import check_card
from certifl.models import code_fingerprint, fingerprint
from certifl.models.building import load
from certifl.models.state import constants_of
from image_sets import write_set
from tiny_study import cli, write_spec

SIZE = 16
X = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3
NOISE = certifl.Brightness(0.1)
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
    "size": {"height": SIZE},
}


def vit(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=classes,
    )  # fmt: skip
    return ViT(config).eval()


def save(network: nn.Module, folder: Path, **processor: object) -> str:
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(vit(), tmp_path_factory.mktemp("hub") / "vit")


def test_the_processors_normalization_is_the_first_layer(name):
    mean, std = (torch.tensor(PROCESSOR[f"image_{k}"]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = vit()(pixel_values=(X - mean) / std).logits
        torch.testing.assert_close(load(name, 3, 3, (SIZE, SIZE))(X), expected)
        gray = load(name, 1, 3)(X[:, :1])
        torch.testing.assert_close(gray, load(name, 3, 3)(X[:, :1].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("preprocessor_config.json", {"image_mean": [0.4] * 3}),
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"layer_norm_eps": 0.1}),
    ],
)
def test_other_files_beside_equal_weights_are_another_network(file, changes, tmp_path):
    """Votes of both must not be counted together, nor one take the other's card."""
    one = load(save(vit(), tmp_path / "hub"), 3, 3)
    path = tmp_path / "hub" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    other = load(f"hf:{tmp_path / 'hub'}", 3, 3)
    assert fingerprint(one) == fingerprint(other)
    assert code_fingerprint(one) != code_fingerprint(other)
    card = {"model_fingerprint": fingerprint(one), "constants": constants_of(one)}
    (tmp_path / "card.json").write_text(json.dumps(card))
    check_card(tmp_path, one)
    with pytest.raises(StoreMismatch, match=r"since its card was written: (mean|config)"):
        check_card(tmp_path, other)


@pytest.mark.parametrize(
    ("said", "scaled"),
    [
        ({"do_normalize": False}, lambda x: x),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
         lambda x: 2 * x - 1),
        ({"do_rescale": False, "do_normalize": False}, lambda x: 255 * x),
    ],
)  # fmt: skip
def test_what_processors_do_to_intensities(said, scaled, tmp_path):
    network = vit()
    found = load(save(network, tmp_path, **said), 3, 3)
    with torch.no_grad():
        expected = network(pixel_values=scaled(X)).logits
        torch.testing.assert_close(found(X), expected, atol=1e-4, rtol=1e-4)


def test_a_resnet_is_certified_as_it_comes():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    network = ResNetForImageClassification(config).eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images).logits

    found = certifl.certify(network, X, NOISE, labels=Y, n=100, precision="float32")
    wanted = certifl.certify(Wrapped().eval(), X, NOISE, labels=Y, n=100, precision="float32")
    assert found.same_results(wanted)
    plain = certifl.predict(network, X, NOISE, n=100, precision="float32")
    assert (
        plain.tolist()
        == certifl.predict(Wrapped().eval(), X, NOISE, n=100, precision="float32").tolist()
    )
    assert certifl.certify(lambda x: network(x), X, NOISE, labels=Y, n=100).same_results(wanted)


def test_loaders_and_data_sets_give_images_with_their_labels():
    network, data = vit(), TensorDataset(X, Y)
    whole = certifl.certify(network, X, NOISE, labels=Y, n=100)
    for images in (DataLoader(data, 4), data, ((x, y) for x, y in DataLoader(data, 4))):
        assert certifl.certify(network, images, NOISE, n=100).same_results(whole)
    unlabeled = certifl.certify(network, X[:1], NOISE, n=100)
    assert unlabeled.label.tolist() == [-1]
    predicted = certifl.predict(network, X, NOISE, n=100)
    assert (
        certifl.predict(network, DataLoader(data, 4), NOISE, n=100).tolist() == predicted.tolist()
    )
    with pytest.raises(InputError, match="shuffle=False"):
        certifl.certify(network, DataLoader(data, 4, shuffle=True), NOISE, n=100)
    with pytest.raises(InputError, match="labels= must be left out"):
        certifl.certify(network, DataLoader(data, 3), NOISE, labels=[Y[:3], Y[3:]], n=100)


def test_the_command_line_takes_a_folder_and_its_own_weights(name, tmp_path):
    write_set(tmp_path / "data" / "photos", shape=(20, 24, 3))
    asked = ("certify", "--model", name, "--data", "photos", "--data-dir", tmp_path / "data")
    noise = ("--family", "brightness", "--sigma", "0.1", "--n", "100", "--images", "3")
    out = tmp_path / "certificates.parquet"
    cli(*asked, *noise, "--out", out, "--resize", SIZE, "--crop", "center").fine()
    certificates = certifl.Certificates.load(out)
    assert len(certificates) == 3
    assert certificates.conditions["model_fingerprint"] is not None
    cli(*asked, *noise, "--out", tmp_path / "second.parquet").refused("--resize 16")


def test_a_study_trains_it_with_a_new_last_layer(name, tmp_path):
    settings = ("data.resize=16", "training.rounds=1", "certification.n=100")
    spec = write_spec(tmp_path, f"model.name={json.dumps(name)}", *settings)
    cli("run", spec, "--out", tmp_path / "run").fine()
    assert (
        certifl.Certificates.load(tmp_path / "run" / "certificates.parquet").counts.shape[1] == 10
    )
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(photo)
    cli("predict", photo, "--run", tmp_path / "run", "--n", "100").fine("resize = [16, 16]")


def test_what_cannot_be_used_is_refused(name, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="has 3 classes, the images 10"):
        load(name, 3, 10)
    with pytest.raises(ModelError, match=r"takes images of 3 channels"):
        load(name, 2, 3)
    with pytest.raises(ModelError, match=r"There is no folder \./absent"):
        load("hf:./absent", 3, 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "net").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"hf:\./owner/net for the folder"):
        load("hf:owner/net", 3, 3)
    save(vit(), tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"processor\.save_pretrained"):
        load("hf:./bare", 3, 3)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"certifl\[hf\]"):
        load(name, 3, 3)


def test_only_safetensors_without_code_are_read(tmp_path):
    name = save(vit(), tmp_path / "net")
    weights = torch.nn.Linear(2, 2).state_dict()
    (tmp_path / "net" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "net" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(name, 3, 3)
    config = tmp_path / "net" / "config.json"
    about = json.loads(config.read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    config.write_text(json.dumps(about))
    (tmp_path / "net" / "own.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ModelError, match="cannot be read"):
        load(name, 3, 3)


def test_classes_in_another_order_are_refused(tmp_path):
    network = vit()
    network.config.id2label = {0: "Oak", 1: "Ash", 2: "Elm"}
    network.config.label2id = {"Oak": 0, "Ash": 1, "Elm": 2}
    name = save(network, tmp_path)
    assert load(name, 3, 3, class_names=("oak", "ash", "elm"))
    with pytest.raises(ModelError, match="numbers the classes as oak, ash, elm, the data as ash"):
        load(name, 3, 3, class_names=("ash", "elm", "oak"))
