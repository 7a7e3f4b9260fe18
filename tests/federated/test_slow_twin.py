"""The engine against plain loops: those of the paper's equations, and those of its benchmark."""

import math
from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from certifl.federated import (
    Algorithm,
    ClientData,
    FedAvg,
    Local,
    LocalTraining,
    Mixture,
    Personalized,
    Schedule,
    deployed_model,
    train,
)
from certifl.perturbations import Rotation
from certifl.runs.checkpoints import Checkpoints
from scripts import load_script

twin = load_script("examples/paper_in_one_file.py")


@dataclass(frozen=True)
class TwinRotation:
    sigma: float

    def sample(self, n, image_shape, generator):
        return twin.sample(n, self.sigma, generator)

    def apply(self, images, params):
        return twin.rotate(images, params)


STUDY = replace(
    twin.Study(), clients=3, batch_size=16, rounds=2, decay_every=3, tuning_epochs=1, seed=11
)
REGIMES: dict[str, Algorithm] = {
    "local": Local(),
    "fedavg": FedAvg(),
    "personalized": Personalized(FedAvg(), epochs=STUDY.tuning_epochs),
    "mixture": Mixture(STUDY.personalization),
}


@pytest.fixture(scope="module")
def parts():
    images, _ = twin.handwritten_digits()
    # 33, 33 and 33 images: two batches of 16 and one image that joins the second.
    few = (images[0][:99], images[1][:99])
    return twin.partition(few, STUDY, "train")


def engine_models(algorithm, parts, study, rotation, folder):
    keys = ("rounds", "local_epochs", "batch_size", "lr", "momentum")
    keys += ("weight_decay", "decay_every", "decay_factor")
    schedule = Schedule(**{key: getattr(study, key) for key in keys})
    model = twin.network(study)
    local = LocalTraining(
        model, schedule, seed=study.seed, augmentation=rotation, finetuning_augmentation=rotation
    )
    clients = [ClientData(i, images, labels) for i, (images, labels) in enumerate(parts)]
    stored = train(algorithm, model, clients, local, Checkpoints(folder))
    return [deployed_model(algorithm, stored, client) for client in range(len(parts))]


@pytest.mark.parametrize("regime", REGIMES)
def test_the_engine_and_plain_loops_train_the_same_models(regime, parts, tmp_path):
    rotation = TwinRotation(STUDY.sigma)
    found = engine_models(REGIMES[regime], parts, STUDY, rotation, tmp_path)
    expected = [model.state_dict() for model in twin.REGIMES[regime](parts, STUDY)]
    start = twin.network(STUDY).state_dict()
    for state, other in zip(found, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=0)
        assert (state["7.weight"] - start["7.weight"]).abs().max() > 0.01  # it did train


def test_the_librarys_rotation_trains_the_same_models(parts, tmp_path):
    """Two bilinear samplers round differently; one round keeps that small."""
    study = replace(STUDY, rounds=1)
    found = engine_models(FedAvg(), parts, study, Rotation(study.sigma), tmp_path)
    expected = twin.federated_averaging(parts, study)[0].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, atol=1e-4, rtol=0)


def test_every_image_belongs_to_one_client():
    labels = torch.arange(100)
    parts = twin.partition((torch.zeros(100, 1, 8, 8), labels), twin.Study(), "train")
    together = torch.cat([labels for _, labels in parts])
    assert sorted(together.tolist()) == list(range(100))


def test_zero_angle_is_the_identity_and_a_quarter_turn_is_rot90():
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(twin.rotate(images, torch.zeros(2, 1)), images)
    quarter = twin.rotate(images, torch.full((2, 1), math.pi / 2))
    torch.testing.assert_close(quarter, torch.rot90(images, 1, (-2, -1)), atol=1e-5, rtol=0)


def test_certify_in_the_two_extremes():
    image = torch.rand(1, 8, 8)

    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.full((len(images),), 3), 10).float()

    predicted, radius = twin.certify(Constant(), image, STUDY)
    unanimous = STUDY.alpha ** (1 / STUDY.n)
    assert predicted == 3
    assert radius == pytest.approx(STUDY.sigma * (2 * unanimous - 1), rel=1e-9)

    class Coin(torch.nn.Module):
        def forward(self, images):
            first = images.flatten(1).sum(1) > images.flatten(1).sum(1).median()
            return torch.stack([first, ~first] + [torch.zeros_like(first)] * 8, 1).float()

    assert twin.certify(Coin(), image, STUDY) == (-1, 0.0)


def test_the_script_prints_a_table(capsys, monkeypatch):
    (images, labels), test = twin.handwritten_digits()
    few = (images[:99], labels[:99]), test
    monkeypatch.setattr(twin, "handwritten_digits", lambda: few)
    twin.main(replace(STUDY, rounds=1, n=50, n0=10, test_images=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(twin.REGIMES)
    for line in lines[2:]:
        at_0, at_5, at_10 = (float(number) for number in line.split()[1:4])
        assert 1 >= at_0 >= at_5 >= at_10 >= 0
        assert np.isfinite(float(line.split()[4]))


def test_all_of_the_benchmark_begin_with_images_on_the_host():
    """In benchmarks/training_gpu.py, or the engine would be spared a transfer of the loader's."""
    benchmark = load_script("benchmarks/training_gpu.py")
    options = Namespace(
        images=23, clients=2, device="meta", perturbation="none", model="small_cnn", batch=4
    )
    setting = benchmark.setting_of(options)
    assert setting.device == torch.device("meta")
    assert [len(data) for data in setting.clients] == [12, 11]
    where = {t.device.type for data in setting.clients for t in (data.images, data.labels)}
    assert where == {"cpu"}
